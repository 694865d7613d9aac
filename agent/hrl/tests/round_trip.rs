//! What is appended is what is read: by our reader from the live and the closed log, and by the format's reader from
//! the `.hrl` file alone.

mod support;

use proptest::prelude::*;
use support::*;
use tidemark_hrl::{LogChain, LogReader};

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0u64..1000, 1u64..20, any::<u64>())
            .prop_map(|(sector, sectors, seed)| Step::Write { sector, sectors, seed }),
        1 => (0u64..1000, 1u64..5000).prop_map(|(sector, sectors)| Step::Zeroes { sector, sectors }),
        1 => prop::collection::vec(any::<u8>(), 0..400).prop_map(|body| Step::Mark { body }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn what_is_appended_is_what_is_read(batches in prop::collection::vec(prop::collection::vec(step(), 0..150), 1..6)) {
        let (folder, storage) = folder();
        let mut log = first_log(&storage);
        let expected: Vec<Seen> = batches.iter().flatten().map(Seen::from).collect();
        for (number, batch) in batches.iter().enumerate() {
            append(&mut log, number as u64, batch).unwrap();
        }
        prop_assert_eq!(log.position().sequence.0, expected.len() as u64);
        prop_assert_eq!(&read_all(&log.reader()).unwrap(), &expected);
        let end = log.position();
        let closed = log.close(time(99)).unwrap();
        prop_assert_eq!(closed.end(), end);
        let reopened = LogReader::open(storage.clone(), &name(1), disk()).unwrap();
        prop_assert_eq!(reopened.end(), end);
        prop_assert_eq!(&read_all(&reopened).unwrap(), &expected);

        #[allow(clippy::disallowed_methods)]
        let (writes, defects) = read_hrl(std::fs::read(folder.path().join(name(1).hrl())).unwrap());
        prop_assert_eq!(defects, Vec::<String>::new());
        let expected: Vec<(u64, Vec<u8>)> = expected.into_iter().filter_map(|seen| match seen {
            Seen::Write { offset, data } => Some((offset, data)),
            Seen::Zeroes { extent } => Some((extent.offset, vec![0; extent.length as usize])),
            Seen::Mark { .. } => None,
        }).collect();
        prop_assert_eq!(writes, expected);
    }

    #[test]
    fn every_position_is_found_across_rotations(
        batches in prop::collection::vec(prop::collection::vec(step(), 1..20), 1..8),
        rotate in prop::collection::vec(any::<bool>(), 8),
    ) {
        let (_folder, storage) = folder();
        let mut log = first_log(&storage);
        let chain = LogChain::open(storage.clone(), "other", disk()).unwrap();
        chain.add(log.reader());
        let mut positions = vec![log.position()];
        let mut number = 1;
        for (batch, rotate) in batches.iter().zip(rotate) {
            for step in batch {
                positions.push(append(&mut log, 0, std::slice::from_ref(step)).unwrap());
            }
            if rotate {
                number += 1;
                let next = tidemark_hrl::PreparedLog::create(storage.clone(), name(number), disk(), DISK_BYTES, time(1)).unwrap();
                let old = log.rotate(next, time(1)).unwrap();
                chain.add(log.reader());
                old.close(time(2)).unwrap();
            }
        }
        let expected: Vec<Seen> = batches.iter().flatten().map(Seen::from).collect();
        let chain_of_disk = {
            log.close(time(3)).unwrap();
            LogChain::open(storage.clone(), STEM, disk()).unwrap()
        };
        for (index, position) in positions.iter().enumerate() {
            prop_assert_eq!(&read_chain(chain_of_disk.records_after(position).unwrap()).unwrap(), &expected[index..]);
            let mut forged = *position;
            forged.hash.0[5] ^= 1;
            prop_assert!(chain_of_disk.records_after(&forged).is_err());
        }
    }
}
