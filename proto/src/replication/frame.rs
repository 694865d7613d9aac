//! The frames of a stream.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::Message as _;
use tidemark_base::{DiskId, Extent, FRAME_BYTES_MAX, Generation, Position};

use super::{CutEnd, CutOrdinal, Differing, Hashes, Need, Refusal, WireError, array, id, positive, wire};

/// 2: scans are compared, and the server asks for what it cannot read.
pub const PROTOCOL_VERSION: u32 = 2;

/// One run of an agent; a newer one fences an older one of the same identity.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct SessionId(pub [u8; 16]);

impl SessionId {
    pub fn random() -> Self {
        // An epoch is drawn from the same source of randomness.
        Self(tidemark_base::Epoch::random().0)
    }
}

/// From a host.
#[derive(Clone, PartialEq, Debug)]
pub enum HostFrame {
    Hello(Hello),
    Data(Data),
    CutEnd(CutEnd),
    Want(u64),
    Hashes(Hashes),
    Close(Close),
}

/// From a process server.
#[derive(Clone, PartialEq, Debug)]
pub enum ServerFrame {
    Welcome(Welcome),
    Grant(u64),
    Durable(Durable),
    Differing(Differing),
    Need(Need),
    Refusal(Refusal),
    Close(Close),
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Hello {
    /// Checked by the server itself, which refuses others by `Refusal`.
    pub version: u32,
    pub disk: DiskId,
    pub generation: Generation,
    pub disk_bytes: u64,
    pub session: SessionId,
    pub acknowledged: Option<Position>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Welcome {
    /// What the journal holds; none when it holds nothing of this disk, or lost some of it: then the whole disk is
    /// scanned, in cuts that count on from those that there were.
    pub durable: Option<Position>,
    /// A scan began and its end never became durable.
    pub scan_open: bool,
    /// The standing credit of an idle stream.
    pub credit_bytes: u64,
    /// The last durable cut.
    pub cut: CutOrdinal,
    /// There is content that a scan may be compared with. Otherwise the replica reads as zeroes.
    pub comparable: bool,
}

/// Sealed chunks of one cut, whole, back to back.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Data {
    pub cut: CutOrdinal,
    pub chunks: Bytes,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Durable {
    pub cut: CutOrdinal,
    pub position: Position,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Close {
    pub cuts: u64,
    pub bytes: u64,
}

impl HostFrame {
    /// The encoded frame in two parts: what is around its payload, and the payload, which is not copied.
    pub fn encode(self) -> (Bytes, Bytes) {
        match self {
            HostFrame::Data(Data { cut, chunks }) => (data_head(cut, chunks.len()), chunks),
            frame => (wire::HostFrame::from(frame).encode_to_vec().into(), Bytes::new()),
        }
    }

    /// A payload that lies in one piece of `bytes` is not copied.
    pub fn decode(bytes: impl Buf) -> Result<Self, WireError> {
        wire::HostFrame::decode(bytes).map_err(|error| WireError::Encoding(error.to_string()))?.try_into()
    }
}

impl ServerFrame {
    pub fn encode(self) -> Bytes {
        wire::ServerFrame::from(self).encode_to_vec().into()
    }

    pub fn decode(bytes: impl Buf) -> Result<Self, WireError> {
        wire::ServerFrame::decode(bytes).map_err(|error| WireError::Encoding(error.to_string()))?.try_into()
    }
}

/// All of an encoded `Data` frame up to its chunks: the fields of a oneof of one message in another, in their order.
fn data_head(cut: CutOrdinal, chunks_bytes: usize) -> Bytes {
    const BODY_DATA: u8 = 2 << 3 | 2;
    const DATA_CUT: u8 = 1 << 3;
    const DATA_CHUNKS: u8 = 2 << 3 | 2;
    let put_number = |number: u64, out: &mut BytesMut| {
        // A protobuf length is any variable-length number.
        prost::encode_length_delimiter(number as usize, out).expect("the buffer grows");
    };
    let mut inner = BytesMut::with_capacity(32);
    if cut.0 != 0 {
        inner.put_u8(DATA_CUT);
        put_number(cut.0, &mut inner);
    }
    if chunks_bytes != 0 {
        inner.put_u8(DATA_CHUNKS);
        put_number(chunks_bytes as u64, &mut inner);
    }
    let mut head = BytesMut::with_capacity(48);
    head.put_u8(BODY_DATA);
    put_number((inner.len() + chunks_bytes) as u64, &mut head);
    head.put(inner);
    head.freeze()
}

impl TryFrom<wire::HostFrame> for HostFrame {
    type Error = WireError;

    fn try_from(wire: wire::HostFrame) -> Result<Self, WireError> {
        use wire::host_frame::Body;
        Ok(match wire.body.ok_or(WireError::Empty)? {
            Body::Hello(hello) => HostFrame::Hello(hello.try_into()?),
            Body::Data(data) => HostFrame::Data(data.try_into()?),
            Body::CutEnd(cut) => HostFrame::CutEnd(cut.try_into()?),
            Body::Want(want) => HostFrame::Want(positive("wanted bytes", want.bytes)?),
            Body::Hashes(hashes) => HostFrame::Hashes(hashes.try_into()?),
            Body::Close(close) => HostFrame::Close(close.into()),
        })
    }
}

impl From<HostFrame> for wire::HostFrame {
    fn from(frame: HostFrame) -> Self {
        use wire::host_frame::Body;
        let body = match frame {
            HostFrame::Hello(hello) => Body::Hello(hello.into()),
            HostFrame::Data(data) => Body::Data(wire::Data { cut: data.cut.0, chunks: data.chunks }),
            HostFrame::CutEnd(cut) => Body::CutEnd(cut.into()),
            HostFrame::Want(bytes) => Body::Want(wire::Want { bytes }),
            HostFrame::Hashes(hashes) => Body::Hashes(hashes.into()),
            HostFrame::Close(close) => Body::Close(close.into()),
        };
        Self { body: Some(body) }
    }
}

impl TryFrom<wire::ServerFrame> for ServerFrame {
    type Error = WireError;

    fn try_from(wire: wire::ServerFrame) -> Result<Self, WireError> {
        use wire::server_frame::Body;
        Ok(match wire.body.ok_or(WireError::Empty)? {
            Body::Welcome(welcome) => ServerFrame::Welcome(welcome.try_into()?),
            Body::Grant(grant) => ServerFrame::Grant(positive("granted bytes", grant.bytes)?),
            Body::Durable(durable) => ServerFrame::Durable(durable.try_into()?),
            Body::Differing(differing) => ServerFrame::Differing(differing.try_into()?),
            Body::Need(need) => ServerFrame::Need(need.try_into()?),
            Body::Refusal(refusal) => ServerFrame::Refusal(refusal.try_into()?),
            Body::Close(close) => ServerFrame::Close(close.into()),
        })
    }
}

impl From<ServerFrame> for wire::ServerFrame {
    fn from(frame: ServerFrame) -> Self {
        use wire::server_frame::Body;
        let body = match frame {
            ServerFrame::Welcome(welcome) => Body::Welcome(welcome.into()),
            ServerFrame::Grant(bytes) => Body::Grant(wire::Grant { bytes }),
            ServerFrame::Durable(durable) => {
                Body::Durable(wire::Durable { cut: durable.cut.0, position: Some(durable.position.into()) })
            }
            ServerFrame::Differing(differing) => Body::Differing(differing.into()),
            ServerFrame::Need(need) => Body::Need(need.into()),
            ServerFrame::Refusal(refusal) => Body::Refusal(refusal.into()),
            ServerFrame::Close(close) => Body::Close(close.into()),
        };
        Self { body: Some(body) }
    }
}

impl TryFrom<wire::Hello> for Hello {
    type Error = WireError;

    fn try_from(wire: wire::Hello) -> Result<Self, WireError> {
        if !Extent::new(0, wire.disk_bytes).is_valid_on(u64::MAX) {
            return Err(WireError::Value { field: "disk bytes", value: wire.disk_bytes });
        }
        Ok(Self {
            version: wire.version,
            disk: id!(DiskId, "disk id", wire.disk)?,
            generation: Generation(positive("generation", wire.generation)?),
            disk_bytes: wire.disk_bytes,
            session: SessionId(array("session", &wire.session)?),
            acknowledged: wire.acknowledged.map(Position::try_from).transpose()?,
        })
    }
}

impl From<Hello> for wire::Hello {
    fn from(hello: Hello) -> Self {
        Self {
            version: hello.version,
            disk: hello.disk.to_vec(),
            generation: hello.generation.0,
            disk_bytes: hello.disk_bytes,
            session: hello.session.0.to_vec(),
            acknowledged: hello.acknowledged.map(Into::into),
        }
    }
}

impl TryFrom<wire::Welcome> for Welcome {
    type Error = WireError;

    fn try_from(wire: wire::Welcome) -> Result<Self, WireError> {
        let durable = wire.durable.map(Position::try_from).transpose()?;
        if durable.is_some() && wire.cut == 0 {
            return Err(WireError::Contradiction("a journal has a position without a cut"));
        }
        if durable.is_some() && !wire.comparable {
            return Err(WireError::Contradiction("a journal has a position and nothing to compare with"));
        }
        Ok(Self {
            durable,
            scan_open: wire.scan_open,
            credit_bytes: wire.credit_bytes,
            cut: CutOrdinal(wire.cut),
            comparable: wire.comparable,
        })
    }
}

impl From<Welcome> for wire::Welcome {
    fn from(welcome: Welcome) -> Self {
        Self {
            durable: welcome.durable.map(Into::into),
            scan_open: welcome.scan_open,
            credit_bytes: welcome.credit_bytes,
            cut: welcome.cut.0,
            comparable: welcome.comparable,
        }
    }
}

impl TryFrom<wire::Data> for Data {
    type Error = WireError;

    fn try_from(wire: wire::Data) -> Result<Self, WireError> {
        if wire.chunks.is_empty() || wire.chunks.len() > FRAME_BYTES_MAX {
            return Err(WireError::Length { field: "a frame of chunks", bytes: wire.chunks.len() });
        }
        Ok(Self { cut: CutOrdinal(positive("the ordinal of a cut", wire.cut)?), chunks: wire.chunks })
    }
}

impl TryFrom<wire::Durable> for Durable {
    type Error = WireError;

    fn try_from(wire: wire::Durable) -> Result<Self, WireError> {
        Ok(Self {
            cut: CutOrdinal(positive("the ordinal of a cut", wire.cut)?),
            position: wire.position.ok_or(WireError::Missing("the durable position"))?.try_into()?,
        })
    }
}

impl From<wire::Close> for Close {
    fn from(wire: wire::Close) -> Self {
        Self { cuts: wire.cuts, bytes: wire.bytes }
    }
}

impl From<Close> for wire::Close {
    fn from(close: Close) -> Self {
        Self { cuts: close.cuts, bytes: close.bytes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidemark_base::Epoch;

    #[test]
    fn frames_survive_the_wire() {
        let hello = HostFrame::Hello(Hello {
            version: PROTOCOL_VERSION,
            disk: DiskId::random(),
            generation: Generation::FIRST,
            disk_bytes: 1 << 20,
            session: SessionId::random(),
            acknowledged: Some(Epoch::random().start()),
        });
        assert_eq!(HostFrame::try_from(wire::HostFrame::from(hello.clone())), Ok(hello));
        let data = HostFrame::Data(Data { cut: CutOrdinal(4), chunks: Bytes::from_static(b"chunk") });
        assert_eq!(HostFrame::try_from(wire::HostFrame::from(data.clone())), Ok(data));
        let durable = ServerFrame::Durable(Durable { cut: CutOrdinal(4), position: Epoch::random().start() });
        assert_eq!(ServerFrame::try_from(wire::ServerFrame::from(durable.clone())), Ok(durable));
    }

    #[test]
    fn a_frame_of_data_is_encoded_as_protobuf_is_without_a_copy_of_its_chunks() {
        for (cut, bytes) in [(1, 1), (127, 127), (128, 128), (300, 16_384), (u64::MAX, FRAME_BYTES_MAX)] {
            let chunks = Bytes::from(vec![7; bytes]);
            let frame = HostFrame::Data(Data { cut: CutOrdinal(cut), chunks: chunks.clone() });
            let (head, payload) = frame.clone().encode();
            assert_eq!(payload.as_ptr(), chunks.as_ptr());
            assert_eq!([head, payload].concat(), wire::HostFrame::from(frame.clone()).encode_to_vec());
            let encoded = Bytes::from(wire::HostFrame::from(frame.clone()).encode_to_vec());
            assert_eq!(HostFrame::decode(encoded), Ok(frame));
        }
        let close = HostFrame::Close(Close { cuts: 3, bytes: 4 });
        let (head, payload) = close.clone().encode();
        assert_eq!((HostFrame::decode(head), payload.len()), (Ok(close), 0));
        let grant = ServerFrame::Grant(5);
        assert_eq!(ServerFrame::decode(grant.clone().encode()), Ok(grant));
        assert!(matches!(HostFrame::decode(&b"\xff\xff"[..]), Err(WireError::Encoding(_))));
    }

    #[test]
    fn hostile_frames_are_refused() {
        let hello = wire::Hello {
            version: 1,
            disk: vec![1; 16],
            generation: 1,
            disk_bytes: 4096,
            session: vec![2; 16],
            acknowledged: None,
        };
        assert!(Hello::try_from(hello.clone()).is_ok());
        for bad in [
            wire::Hello { disk: vec![0; 16], ..hello.clone() },
            wire::Hello { generation: 0, ..hello.clone() },
            wire::Hello { disk_bytes: 100, ..hello.clone() },
            wire::Hello { disk_bytes: 0, ..hello.clone() },
            wire::Hello { session: vec![], ..hello },
        ] {
            assert!(Hello::try_from(bad).is_err());
        }
        assert!(HostFrame::try_from(wire::HostFrame { body: None }).is_err());
        assert!(Data::try_from(wire::Data { cut: 1, chunks: Bytes::new() }).is_err());
        let long = Bytes::from(vec![0; FRAME_BYTES_MAX + 1]);
        assert!(Data::try_from(wire::Data { cut: 1, chunks: long }).is_err());
        // A journal that lost cuts has no position to go on from, and counts on all the same.
        let welcome = wire::Welcome { durable: None, scan_open: true, credit_bytes: 1, cut: 3, comparable: true };
        assert!(Welcome::try_from(welcome.clone()).is_ok());
        let durable = Some(tidemark_base::Epoch([3; 16]).start().into());
        assert!(Welcome::try_from(wire::Welcome { durable: durable.clone(), cut: 0, ..welcome.clone() }).is_err());
        assert!(Welcome::try_from(wire::Welcome { durable, comparable: false, ..welcome }).is_err());
    }
}
