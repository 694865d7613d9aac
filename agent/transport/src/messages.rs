//! gRPC messages whose payload is never copied.
//!
//! A codec of tonic's is handed one growing buffer in each direction: every byte of a frame is copied into it, between
//! the frame and HTTP/2. Here a message is what is around the payload, and the payload itself, which goes into an
//! HTTP/2 frame of its own; what arrives is taken apart in the pieces in which it came. On the wire nothing differs:
//! any gRPC client or server may be at the other end.
//!
//! *Consistency.* A body that ends inside a message, a message that is longer than its reader allows, and one that says
//! it is compressed are errors. *Retries.* None. *Cancellation.* [`Messages::next`] loses nothing when it is dropped.
//! *Crash.* Nothing here is durable.

use std::collections::VecDeque;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use hyper::body::Frame;
use tokio_stream::Stream;
use tonic::body::Body;
use tonic::codegen::http::header::{CONTENT_TYPE, HeaderName, HeaderValue};
use tonic::codegen::{Body as HttpBody, Service, http};
use tonic::metadata::GRPC_CONTENT_TYPE;
use tonic::transport::Channel;
use tonic::{Code, Status};

/// In front of each message: whether it is compressed, and its length.
const PREFIX_BYTES: usize = 5;
/// Payloads shorter than this are copied behind the head: a frame of their own would cost more.
const PAYLOAD_BYTES_MIN: usize = 1024;
/// Pieces shorter than this are gathered when they arrive, so that a peer who sends single bytes fills no memory with
/// what is around them.
const PIECE_BYTES_MIN: usize = 1024;

/// A message to be sent: `head`, then `payload`.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Message {
    pub head: Bytes,
    pub payload: Bytes,
}

impl From<Bytes> for Message {
    fn from(head: Bytes) -> Self {
        Self { head, payload: Bytes::new() }
    }
}

/// Calls a method with a stream in both directions. `answer_bytes_max`: longer answers are refused.
pub async fn call(
    mut channel: Channel,
    path: &'static str,
    messages: impl Stream<Item = Message> + Send + 'static,
    answer_bytes_max: usize,
) -> Result<Messages, Status> {
    let mut request = http::Request::post(path)
        .body(Body::new(Sending {
            messages: Box::pin(messages),
            payload: Bytes::new(),
            is_answer: false,
            ended: false,
        }))
        .map_err(|error| Status::internal(error.to_string()))?;
    *request.version_mut() = http::Version::HTTP_2;
    request.headers_mut().insert(HeaderName::from_static("te"), HeaderValue::from_static("trailers"));
    request.headers_mut().insert(CONTENT_TYPE, GRPC_CONTENT_TYPE);
    std::future::poll_fn(|context| channel.poll_ready(context))
        .await
        .map_err(|error| Status::from_error(Box::new(error)))?;
    let response = channel.call(request).await.map_err(|error| Status::from_error(Box::new(error)))?;
    if let Some(status) = Status::from_header_map(response.headers())
        && status.code() != Code::Ok
    {
        return Err(status);
    }
    if response.status() != http::StatusCode::OK {
        return Err(Status::unavailable(format!("the server answered with HTTP status {}", response.status())));
    }
    Ok(Messages::new(response.into_body(), answer_bytes_max))
}

/// Answers a call of a method with a stream in both directions.
pub fn answer(messages: impl Stream<Item = Message> + Send + 'static) -> http::Response<Body> {
    let sending = Sending { messages: Box::pin(messages), payload: Bytes::new(), is_answer: true, ended: false };
    let mut response = http::Response::new(Body::new(sending));
    response.headers_mut().insert(CONTENT_TYPE, GRPC_CONTENT_TYPE);
    response
}

/// A body of messages.
struct Sending<S> {
    messages: Pin<Box<S>>,
    /// Of the message whose head was sent.
    payload: Bytes,
    /// Answers end with a status.
    is_answer: bool,
    ended: bool,
}

impl<S: Stream<Item = Message>> HttpBody for Sending<S> {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if !self.payload.is_empty() {
            return Poll::Ready(Some(Ok(Frame::data(std::mem::take(&mut self.payload)))));
        }
        if self.ended {
            return Poll::Ready(None);
        }
        let Some(Message { head, payload }) = ready!(self.messages.as_mut().poll_next(context)) else {
            self.ended = true;
            if !self.is_answer {
                return Poll::Ready(None);
            }
            let mut trailers = http::HeaderMap::new();
            trailers.insert(Status::GRPC_STATUS, HeaderValue::from(Code::Ok as i32));
            return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
        };
        let Ok(length) = u32::try_from(head.len() + payload.len()) else {
            self.ended = true;
            return Poll::Ready(Some(Err(Status::out_of_range("a message of more than 4 GiB"))));
        };
        let copied = if payload.len() < PAYLOAD_BYTES_MIN { payload.len() } else { 0 };
        let mut front = BytesMut::with_capacity(PREFIX_BYTES + head.len() + copied);
        front.put_u8(0);
        front.put_u32(length);
        front.put(head);
        if copied > 0 {
            front.put(payload);
        } else {
            self.payload = payload;
        }
        Poll::Ready(Some(Ok(Frame::data(front.freeze()))))
    }
}

/// The messages of a body, as they arrive.
pub struct Messages {
    body: Body,
    pieces: Pieces,
    /// Short pieces that came after them.
    gathered: BytesMut,
    /// The length of the message whose prefix was read.
    length: Option<usize>,
    bytes_max: usize,
    ended: bool,
}

impl Messages {
    pub fn new(body: Body, bytes_max: usize) -> Self {
        Self { body, pieces: Pieces::default(), gathered: BytesMut::new(), length: None, bytes_max, ended: false }
    }

    /// The next message; `None` at the end. Cancel safe.
    pub async fn next(&mut self) -> Result<Option<Pieces>, Status> {
        loop {
            if let Some(message) = self.take()? {
                return Ok(Some(message));
            }
            if self.ended {
                return Ok(None);
            }
            let Some(frame) = std::future::poll_fn(|context| Pin::new(&mut self.body).poll_frame(context)).await else {
                self.ended = true;
                if self.length.is_some() || self.pieces.has_remaining() || !self.gathered.is_empty() {
                    return Err(Status::internal("the stream ended inside a message"));
                }
                return Ok(None);
            };
            match frame?.into_data() {
                Ok(data) => self.push(data),
                Err(frame) => {
                    let status = frame.trailers_ref().and_then(Status::from_header_map);
                    if let Some(status) = status.filter(|status| status.code() != Code::Ok) {
                        self.ended = true;
                        return Err(status);
                    }
                }
            }
        }
    }

    fn push(&mut self, data: Bytes) {
        if data.len() < PIECE_BYTES_MIN {
            self.gathered.extend_from_slice(&data);
        } else {
            self.join();
            self.pieces.push(data);
        }
    }

    fn join(&mut self) {
        self.pieces.push(self.gathered.split().freeze());
    }

    fn take(&mut self) -> Result<Option<Pieces>, Status> {
        let here = |this: &Self| this.pieces.remaining() + this.gathered.len();
        if self.length.is_none() && here(self) >= PREFIX_BYTES {
            self.join();
            if self.pieces.get_u8() != 0 {
                return Err(Status::unimplemented("a message is compressed, which was not agreed on"));
            }
            let length = self.pieces.get_u32() as usize;
            if length > self.bytes_max {
                let limit = self.bytes_max;
                return Err(Status::out_of_range(format!("a message has {length} bytes, the limit is {limit}")));
            }
            self.length = Some(length);
        }
        match self.length {
            Some(length) if here(self) >= length => {
                self.join();
                self.length = None;
                Ok(Some(self.pieces.split_to(length)))
            }
            _ => Ok(None),
        }
    }
}

/// Bytes in the pieces in which they came. What lies in one piece is taken out without a copy.
#[derive(Default, Debug)]
pub struct Pieces {
    queue: VecDeque<Bytes>,
    bytes: usize,
}

impl Pieces {
    fn push(&mut self, piece: Bytes) {
        if !piece.is_empty() {
            self.bytes += piece.len();
            self.queue.push_back(piece);
        }
    }

    fn split_to(&mut self, bytes: usize) -> Self {
        let mut front = Self::default();
        while front.bytes < bytes {
            let piece = self.queue.front_mut().expect("so many bytes were counted");
            let part = piece.split_to(piece.len().min(bytes - front.bytes));
            if piece.is_empty() {
                self.queue.pop_front();
            }
            self.bytes -= part.len();
            front.push(part);
        }
        front
    }
}

impl Buf for Pieces {
    fn remaining(&self) -> usize {
        self.bytes
    }

    fn chunk(&self) -> &[u8] {
        self.queue.front().map_or(&[], |piece| &piece[..])
    }

    fn advance(&mut self, mut count: usize) {
        assert!(count <= self.bytes);
        self.bytes -= count;
        while let Some(piece) = self.queue.front_mut() {
            let part = piece.len().min(count);
            piece.advance(part);
            count -= part;
            if piece.is_empty() {
                self.queue.pop_front();
            } else {
                return;
            }
        }
    }

    fn copy_to_bytes(&mut self, length: usize) -> Bytes {
        assert!(length <= self.bytes);
        let mut front = self.split_to(length);
        match front.queue.len() {
            0 => Bytes::new(),
            1 => front.queue.pop_front().expect("there is one"),
            _ => {
                let mut all = BytesMut::with_capacity(length);
                front.queue.drain(..).for_each(|piece| all.extend_from_slice(&piece));
                all.freeze()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;
    use proptest::prelude::*;

    use super::*;

    fn bytes(length: usize, seed: u8) -> Bytes {
        (0..length).map(|at| (at * 7 + at / 251) as u8 ^ seed).collect()
    }

    async fn sent(messages: Vec<Message>) -> Vec<Bytes> {
        let mut body = answer(tokio_stream::iter(messages)).into_body();
        let mut frames = Vec::new();
        while let Some(frame) = body.frame().await {
            if let Ok(data) = frame.unwrap().into_data() {
                frames.push(data);
            }
        }
        frames
    }

    /// A body of data frames, with a status at its end or none.
    fn body(frames: Vec<Bytes>, status: Option<Status>) -> Body {
        let mut frames: Vec<Result<Frame<Bytes>, Status>> =
            frames.into_iter().map(|data| Ok(Frame::data(data))).collect();
        if let Some(status) = status {
            let mut trailers = http::HeaderMap::new();
            status.add_header(&mut trailers).unwrap();
            frames.push(Ok(Frame::trailers(trailers)));
        }
        Body::new(http_body_util::StreamBody::new(tokio_stream::iter(frames)))
    }

    fn run<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
    }

    proptest! {
        #[test]
        fn messages_arrive_however_they_are_cut(
            lengths in prop::collection::vec((0usize..3000, prop_oneof![Just(0usize), 1usize..5000]), 1..8),
            cuts in prop::collection::vec(prop_oneof![1usize..20, 1000usize..3000], 1..20),
        ) {
            let messages: Vec<Message> = lengths.iter().enumerate().map(|(index, &(head, payload))| Message {
                head: bytes(head, index as u8),
                payload: bytes(payload, !index as u8),
            }).collect();
            run(async {
                let all: Bytes = sent(messages.clone()).await.concat().into();
                let (mut rest, mut frames) = (all, Vec::new());
                for cut in cuts.iter().cycle() {
                    if rest.is_empty() { break; }
                    frames.push(rest.split_to(rest.len().min(*cut)));
                }
                let mut arriving = Messages::new(body(frames, Some(Status::ok(""))), 8000);
                for message in messages {
                    let mut pieces = arriving.next().await.unwrap().unwrap();
                    assert_eq!(pieces.copy_to_bytes(message.head.len()), message.head);
                    assert_eq!(pieces.copy_to_bytes(pieces.remaining()), message.payload);
                }
                assert!(arriving.next().await.unwrap().is_none());
                assert!(arriving.next().await.unwrap().is_none());
            });
        }
    }

    #[test]
    fn a_payload_is_never_copied() {
        let payload = bytes(100_000, 1);
        let frames = run(sent(vec![Message { head: bytes(20, 0), payload: payload.clone() }]));
        assert_eq!(frames.len(), 2);
        assert_eq!(frames[1].as_ptr(), payload.as_ptr());
        run(async {
            let mut arriving = Messages::new(body(frames, None), 1 << 20);
            let mut pieces = arriving.next().await.unwrap().unwrap();
            pieces.advance(20);
            assert_eq!(pieces.copy_to_bytes(100_000).as_ptr(), payload.as_ptr());
        });
    }

    #[test]
    fn what_is_no_message_is_an_error() {
        let code = |frames: Vec<Bytes>, status| {
            run(async { Messages::new(body(frames, status), 10).next().await.unwrap_err().code() })
        };
        let whole = Bytes::from_static(&[0, 0, 0, 0, 3, 1, 2, 3]);
        assert_eq!(code(vec![whole.slice(..7)], None), Code::Internal);
        assert_eq!(code(vec![whole.slice(..3)], None), Code::Internal);
        assert_eq!(code(vec![Bytes::from_static(&[0, 0, 0, 0, 11])], None), Code::OutOfRange);
        assert_eq!(code(vec![Bytes::from_static(&[1, 0, 0, 0, 3, 1, 2, 3])], None), Code::Unimplemented);
        assert_eq!(code(vec![], Some(Status::unavailable("later"))), Code::Unavailable);
    }

    #[test]
    fn single_bytes_fill_no_memory() {
        run(async {
            let mut frames = vec![Bytes::from_static(&[0, 0, 0, 0x20, 0])];
            frames.extend((0..0x2000).map(|at| Bytes::from(vec![at as u8; 1])));
            let mut arriving = Messages::new(body(frames, None), 1 << 20);
            let pieces = arriving.next().await.unwrap().unwrap();
            assert_eq!((pieces.remaining(), pieces.queue.len()), (0x2000, 1));
        });
    }
}
