//! Conversions of a machine's description on the way over, each of which can be taken back on the way home.
//!
//! Generation 1 (BIOS, boots from IDE) and generation 2 (UEFI, no IDE) are Hyper-V's words for what a target may have only
//! one of. A conversion changes firmware and buses and nothing else; what was is kept beside the result, so that the way
//! back restores exactly that and keeps whatever was changed meanwhile (memory, networks, disks that were added).
//!
//! The disks' content is not changed: a disk that was installed for UEFI boots under BIOS only when it carries a boot
//! loader for both, or when the description names a kernel.

use serde::{Deserialize, Serialize};

use crate::machine::{Bus, Firmware, Hardware, IDE_DISKS_MAX};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Generation {
    #[serde(rename = "1")]
    One,
    #[serde(rename = "2")]
    Two,
}

impl Generation {
    pub fn of(hardware: &Hardware) -> Self {
        match hardware.firmware {
            Firmware::Bios => Generation::One,
            Firmware::Uefi => Generation::Two,
        }
    }
}

/// What a conversion changed: enough to take it back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Was {
    pub firmware: Firmware,
    pub buses: Vec<Bus>,
    /// What the conversion made of the buses: disks whose bus is still that get their old one back.
    pub became: Vec<Bus>,
}

/// The machine as generation `to`. `None`: it is that already, and nothing changes.
pub fn convert(hardware: &Hardware, disks: usize, to: Generation) -> (Hardware, Option<Was>) {
    if Generation::of(hardware) == to {
        return (hardware.clone(), None);
    }
    let mut converted = hardware.clone();
    let buses = (0..disks).map(|index| hardware.bus(index));
    match to {
        Generation::One => {
            converted.firmware = Firmware::Bios;
            // It boots from IDE, as generation 1 does; the other disks need not move.
            converted.buses = buses.enumerate().map(|(index, bus)| if index == 0 { Bus::Ide } else { bus }).collect();
        }
        Generation::Two => {
            converted.firmware = Firmware::Uefi;
            converted.buses = buses.map(|bus| if bus == Bus::Ide { Bus::Scsi } else { bus }).collect();
        }
    }
    debug_assert!(converted.buses.iter().filter(|bus| **bus == Bus::Ide).count() <= IDE_DISKS_MAX);
    let was = Was { firmware: hardware.firmware, buses: hardware.buses.clone(), became: converted.buses.clone() };
    (converted, Some(was))
}

/// Takes a conversion back: firmware and buses are as they were, everything else is as it is now.
pub fn revert(hardware: &Hardware, was: &Was) -> Hardware {
    let mut home = hardware.clone();
    home.firmware = was.firmware;
    if hardware.buses == was.became {
        home.buses = was.buses.clone();
        return home;
    }
    // Disks were added, removed or moved meanwhile: those that were not touched get theirs back.
    let before = Hardware { buses: was.buses.clone(), ..Hardware::default() };
    home.buses = hardware
        .buses
        .iter()
        .enumerate()
        .map(|(index, bus)| match was.became.get(index) {
            Some(became) if became == bus => before.bus(index),
            _ if was.firmware == Firmware::Uefi && *bus == Bus::Ide => Bus::Scsi,
            _ => *bus,
        })
        .collect();
    home
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::{Card, CardModel, Kernel, Network};
    use proptest::prelude::*;

    fn bus() -> impl Strategy<Value = Bus> {
        prop::sample::select(vec![Bus::Ide, Bus::Sata, Bus::Scsi, Bus::Virtio, Bus::Nvme])
    }

    fn hardware() -> impl Strategy<Value = Hardware> {
        let card = (any::<bool>(), any::<bool>()).prop_map(|(isolated, virtio)| Card {
            network: if isolated { Network::Isolated } else { Network::Bridge("br0".into()) },
            mac: None,
            model: if virtio { CardModel::Virtio } else { CardModel::E1000e },
            addresses: vec!["10.1.2.3/16".into()],
        });
        let kernel = Kernel { image: "/k".into(), initrd: None, command_line: "quiet".into() };
        (
            any::<bool>(),
            1..=64u16,
            32..=65_536u64,
            prop::collection::vec(bus(), 0..7),
            prop::collection::vec(card, 0..4),
            prop::option::of(Just(kernel)),
        )
            .prop_map(|(uefi, processors, memory_mib, buses, cards, kernel)| Hardware {
                firmware: if uefi { Firmware::Uefi } else { Firmware::Bios },
                processors,
                memory_mib,
                buses,
                cards,
                kernel,
            })
    }

    proptest! {
        #[test]
        fn each_conversion_can_be_taken_back(before in hardware(), disks in 0..7usize, memory in 32..9000u64) {
            prop_assume!(before.check(disks).is_ok());
            for to in [Generation::One, Generation::Two] {
                let (converted, was) = convert(&before, disks, to);
                prop_assert_eq!(Generation::of(&converted), to);
                prop_assert!(converted.check(disks).is_ok(), "{:?}", converted);
                let Some(was) = was else {
                    prop_assert_eq!(&converted, &before);
                    continue;
                };
                prop_assert_eq!(&revert(&converted, &was), &before);
                // What was changed meanwhile stays.
                let mut changed = converted.clone();
                changed.memory_mib = memory;
                let home = revert(&changed, &was);
                prop_assert_eq!(home.memory_mib, memory);
                prop_assert_eq!(&home.buses, &before.buses);
                prop_assert_eq!(home.firmware, before.firmware);
                // A disk that was added meanwhile is there, and the machine can be made at home.
                changed.buses.push(Bus::Virtio);
                let home = revert(&changed, &was);
                prop_assert_eq!(home.buses.len(), changed.buses.len());
                prop_assert!(home.check(home.buses.len()).is_ok());
            }
        }
    }
}
