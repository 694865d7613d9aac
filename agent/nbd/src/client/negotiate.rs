//! The client's side of the handshake.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use rustls::pki_types::ServerName;

use super::{ClientError, ExportInfo, REQUEST_BYTES_DEFAULT};
use crate::stream::Stream;
use crate::wire::{self, Fields, info, opt, rep};

/// Data of one reply to an option: a name and a few numbers.
const REPLY_BYTES_MAX: u32 = 64 << 10;
/// Replies to one option.
const REPLIES_MAX: usize = 1024;

/// How the server is to prove itself.
pub struct TlsTo {
    pub name: ServerName<'static>,
    pub config: Arc<rustls::ClientConfig>,
}

pub struct Handshake<'a> {
    pub stream: &'a Stream,
    pub deadline: Instant,
}

struct Reply {
    kind: u32,
    data: Vec<u8>,
}

impl Reply {
    fn is_error(&self) -> bool {
        self.kind & rep::ERROR != 0
    }

    fn refusal(&self, name: &str) -> ClientError {
        let reason = match self.kind {
            _ if !self.data.is_empty() => String::from_utf8_lossy(&self.data).into_owned(),
            rep::ERR_UNKNOWN => "there is no such export".to_owned(),
            rep::ERR_TLS_REQD => "the server wants TLS".to_owned(),
            rep::ERR_POLICY => "the server does not allow it".to_owned(),
            rep::ERR_SHUTDOWN => "the server is stopping".to_owned(),
            rep::ERR_UNSUP => "the server does not know this option".to_owned(),
            kind => format!("error {:#x}", kind),
        };
        ClientError::Refused { name: name.to_owned(), reason }
    }
}

/// What the server offers under the name.
#[derive(Default)]
pub struct Agreed {
    pub info: ExportInfo,
    pub structured: bool,
    /// The server's number of `base:allocation`, if it has it.
    pub allocation: Option<u32>,
    /// Of the other context that was asked for.
    pub context: Option<u32>,
}

impl Handshake<'_> {
    pub fn run(&self, name: &str, tls: Option<TlsTo>, context: Option<&str>) -> Result<Agreed, ClientError> {
        let mut greeting = [0; 18];
        self.stream.receive_exact(&mut greeting, self.deadline)?;
        if wire::u64_at(&greeting, 0) != wire::NBDMAGIC || wire::u64_at(&greeting, 8) != wire::IHAVEOPT {
            return Err(ClientError::Protocol("this is not a newstyle NBD server"));
        }
        let flags = wire::u16_at(&greeting, 16);
        if flags & wire::FLAG_FIXED_NEWSTYLE == 0 {
            return Err(ClientError::Protocol("the server does not speak fixed newstyle"));
        }
        let ours = flags & (wire::FLAG_FIXED_NEWSTYLE | wire::FLAG_NO_ZEROES);
        self.stream.send(&u32::from(ours).to_be_bytes())?;
        if let Some(TlsTo { name: server, config }) = tls {
            let answer = self.ask(opt::STARTTLS, &[])?;
            if let Some(refused) = answer.last().filter(|reply| reply.is_error()) {
                return Err(refused.refusal(name));
            }
            let connection = rustls::ClientConnection::new(config, server)
                .map_err(|error| ClientError::Tls(io::Error::new(io::ErrorKind::InvalidInput, error)))?;
            self.stream.start_tls(connection.into(), self.deadline).map_err(ClientError::Tls)?;
        }
        let mut agreed = Agreed { structured: succeeded(&self.ask(opt::STRUCTURED_REPLY, &[])?), ..Agreed::default() };
        if agreed.structured {
            let contexts: Vec<&str> = [wire::BASE_ALLOCATION].into_iter().chain(context).collect();
            let mut selected = self.select(name, &contexts)?.into_iter();
            agreed.allocation = selected.next().flatten();
            agreed.context = selected.next().flatten();
        }
        agreed.info = self.go(name)?;
        Ok(agreed)
    }

    /// Sends an option and collects the replies up to the one that ends it.
    fn ask(&self, option: u32, data: &[u8]) -> Result<Vec<Reply>, ClientError> {
        let mut message = wire::IHAVEOPT.to_be_bytes().to_vec();
        message.extend(option.to_be_bytes());
        message.extend((data.len() as u32).to_be_bytes());
        message.extend(data);
        self.stream.send(&message)?;
        let mut replies = Vec::new();
        while replies.len() < REPLIES_MAX {
            let mut head = [0; 20];
            self.stream.receive_exact(&mut head, self.deadline)?;
            let bytes = wire::u32_at(&head, 16);
            if wire::u64_at(&head, 0) != wire::REPLY_MAGIC_OPTION || wire::u32_at(&head, 8) != option {
                return Err(ClientError::Protocol("a reply to another option"));
            }
            if bytes > REPLY_BYTES_MAX {
                return Err(ClientError::Protocol("a reply to an option is too long"));
            }
            let mut data = vec![0; bytes as usize];
            self.stream.receive_exact(&mut data, self.deadline)?;
            let reply = Reply { kind: wire::u32_at(&head, 12), data };
            let ends = reply.kind == rep::ACK || reply.is_error();
            replies.push(reply);
            if ends {
                return Ok(replies);
            }
        }
        Err(ClientError::Protocol("too many replies to an option"))
    }

    /// The server's number of each context, if it has it.
    fn select(&self, name: &str, contexts: &[&str]) -> Result<Vec<Option<u32>>, ClientError> {
        let mut data = named(name);
        data.extend((contexts.len() as u32).to_be_bytes());
        contexts.iter().for_each(|context| data.extend(named(context)));
        let replies = self.ask(opt::SET_META_CONTEXT, &data)?;
        let number_of = |context: &&str| {
            replies.iter().filter(|reply| reply.kind == rep::META_CONTEXT).find_map(|reply| {
                let mut fields = Fields(&reply.data);
                let id = fields.u32()?;
                (fields.0 == context.as_bytes()).then_some(id)
            })
        };
        Ok(contexts.iter().map(|context| number_of(context).filter(|_| succeeded(&replies))).collect())
    }

    fn go(&self, name: &str) -> Result<ExportInfo, ClientError> {
        let mut data = named(name);
        data.extend(1u16.to_be_bytes());
        data.extend(info::BLOCK_SIZE.to_be_bytes());
        let replies = self.ask(opt::GO, &data)?;
        if let Some(refused) = replies.last().filter(|reply| reply.is_error()) {
            return Err(refused.refusal(name));
        }
        let malformed = || ClientError::Protocol("malformed information about the export");
        let mut export = None;
        let mut blocks = (1, 4096, REQUEST_BYTES_DEFAULT);
        for reply in replies.iter().filter(|reply| reply.kind == rep::INFO) {
            let mut fields = Fields(&reply.data);
            match fields.u16().ok_or_else(malformed)? {
                info::EXPORT => {
                    export = Some((fields.u64().ok_or_else(malformed)?, fields.u16().ok_or_else(malformed)?));
                }
                info::BLOCK_SIZE => {
                    let mut next = || fields.u32().filter(|bytes| *bytes > 0).ok_or_else(malformed);
                    blocks = (next()?, next()?, next()?);
                }
                _ => {}
            }
        }
        let (bytes, flags) = export.ok_or_else(malformed)?;
        Ok(ExportInfo {
            bytes,
            flags,
            block_bytes_min: blocks.0,
            block_bytes_preferred: blocks.1,
            request_bytes_max: blocks.2,
        })
    }
}

fn succeeded(replies: &[Reply]) -> bool {
    replies.last().is_some_and(|reply| reply.kind == rep::ACK)
}

fn named(name: &str) -> Vec<u8> {
    let mut bytes = (name.len() as u32).to_be_bytes().to_vec();
    bytes.extend(name.as_bytes());
    bytes
}
