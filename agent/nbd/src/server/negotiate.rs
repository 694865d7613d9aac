//! The handshake: fixed newstyle, from the greeting to the chosen export.
//!
//! Everything here is hostile until it is proven otherwise: lengths are checked before memory is taken for them, the
//! whole handshake has one deadline and a limited number of options, and on TCP nothing but STARTTLS is answered before TLS is on.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use rustls::ServerConfig;

use super::registry::{Lease, Registry};
use crate::export::{Export, ExportProvider, OpenError, Peer};
use crate::limits::Limits;
use crate::stream::Stream;
use crate::wire::{self, Fields, info, opt, rep};

/// What the client and we agreed on.
pub struct Negotiated {
    pub export: Arc<dyn Export>,
    pub lease: Lease,
    pub peer: Peer,
    pub structured: bool,
    /// `base:allocation` was selected.
    pub allocation: bool,
}

/// Why a handshake ended without an export.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    #[error("the client left")]
    Left,
    #[error("the handshake took longer than its limit")]
    TimedOut,
    #[error("the client broke the protocol: {0}")]
    Protocol(&'static str),
    #[error("the client sent an option of {bytes} bytes")]
    OptionTooLong { bytes: u32 },
    #[error("the client showed no certificate")]
    NoCertificate,
    #[error("TLS failed")]
    Tls(#[source] io::Error),
    #[error("the connection failed")]
    Io(#[source] io::Error),
}

impl From<io::Error> for HandshakeError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => Self::Left,
            io::ErrorKind::TimedOut => Self::TimedOut,
            _ => Self::Io(error),
        }
    }
}

/// Who connects, as far as it is known when the handshake begins.
pub enum Admission {
    /// Known by the system; TLS is not offered.
    Known(Peer),
    /// Must authenticate itself by TLS before anything else.
    Tls { address: std::net::SocketAddr, config: Arc<ServerConfig> },
}

pub struct Handshake<'a> {
    pub stream: &'a Stream,
    pub provider: &'a dyn ExportProvider,
    pub registry: &'a Arc<Registry>,
    pub limits: &'a Limits,
    pub connection: u64,
    pub deadline: Instant,
}

/// What was agreed on so far; TLS starts it again.
#[derive(Default)]
struct Agreed {
    no_zeroes: bool,
    structured: bool,
    /// The export for which `base:allocation` was selected.
    allocation_of: Option<String>,
}

/// What an option asks of the handshake beyond its replies.
enum Next {
    Option,
    Transmission(Box<Negotiated>),
}

impl Handshake<'_> {
    pub fn run(&self, admission: Admission) -> Result<Negotiated, HandshakeError> {
        let mut greeting = Vec::with_capacity(18);
        greeting.extend(wire::NBDMAGIC.to_be_bytes());
        greeting.extend(wire::IHAVEOPT.to_be_bytes());
        greeting.extend((wire::FLAG_FIXED_NEWSTYLE | wire::FLAG_NO_ZEROES).to_be_bytes());
        self.stream.set_timeout(Some(self.limits.handshake_timeout))?;
        self.stream.send(&greeting)?;
        let mut flags = [0; 4];
        self.receive(&mut flags)?;
        let flags = u32::from_be_bytes(flags);
        if flags & !u32::from(wire::FLAG_FIXED_NEWSTYLE | wire::FLAG_NO_ZEROES) != 0 {
            return Err(HandshakeError::Protocol("unknown client flags"));
        }
        let mut agreed = Agreed { no_zeroes: flags & u32::from(wire::FLAG_NO_ZEROES) != 0, ..Agreed::default() };
        let (mut peer, mut tls) = match admission {
            Admission::Known(peer) => (Some(peer), None),
            Admission::Tls { address, config } => (None, Some((address, config))),
        };
        for _ in 0..self.limits.options_max {
            let (option, data) = self.receive_option()?;
            let Some(peer) = &peer else {
                match (option, &tls) {
                    (opt::STARTTLS, Some((address, config))) if data.is_empty() => {
                        peer = Some(self.start_tls(*address, config.clone())?);
                        tls = None;
                        agreed = Agreed { no_zeroes: agreed.no_zeroes, ..Agreed::default() };
                    }
                    (opt::STARTTLS, _) => self.reply(option, rep::ERR_INVALID, b"STARTTLS has no data")?,
                    (opt::ABORT, _) => return self.abort(),
                    (opt::EXPORT_NAME, _) => return Err(HandshakeError::Protocol("EXPORT_NAME before TLS")),
                    _ => self.reply(option, rep::ERR_TLS_REQD, b"this server talks TLS only")?,
                }
                continue;
            };
            match self.answer(option, &data, &mut agreed, peer)? {
                Next::Option => {}
                Next::Transmission(negotiated) => return Ok(*negotiated),
            }
        }
        Err(HandshakeError::Protocol("too many options"))
    }

    fn receive(&self, buffer: &mut [u8]) -> Result<(), HandshakeError> {
        Ok(self.stream.receive_exact(buffer, self.deadline)?)
    }

    fn receive_option(&self) -> Result<(u32, Vec<u8>), HandshakeError> {
        let mut head = [0; 16];
        self.receive(&mut head)?;
        if wire::u64_at(&head, 0) != wire::IHAVEOPT {
            return Err(HandshakeError::Protocol("wrong magic number of an option"));
        }
        let (option, bytes) = (wire::u32_at(&head, 8), wire::u32_at(&head, 12));
        if bytes > self.limits.option_bytes_max {
            return Err(HandshakeError::OptionTooLong { bytes });
        }
        let mut data = vec![0; bytes as usize];
        self.receive(&mut data)?;
        Ok((option, data))
    }

    fn start_tls(&self, address: std::net::SocketAddr, config: Arc<ServerConfig>) -> Result<Peer, HandshakeError> {
        self.reply(opt::STARTTLS, rep::ACK, &[])?;
        let connection = rustls::ServerConnection::new(config)
            .map_err(|error| HandshakeError::Tls(io::Error::new(io::ErrorKind::InvalidInput, error)))?;
        match self.stream.start_tls(connection.into(), self.deadline) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::InvalidData => return Err(HandshakeError::Tls(error)),
            Err(error) => return Err(error.into()),
        }
        // A configuration that does not ask for certificates would let everybody in.
        let certificates = self.stream.certificates().unwrap_or_default();
        if certificates.is_empty() {
            return Err(HandshakeError::NoCertificate);
        }
        Ok(Peer::Tls { address, certificates })
    }

    fn abort<T>(&self) -> Result<T, HandshakeError> {
        // The client may have closed already; it wants no answer then.
        let _ = self.reply(opt::ABORT, rep::ACK, &[]);
        Err(HandshakeError::Left)
    }

    fn answer(&self, option: u32, data: &[u8], agreed: &mut Agreed, peer: &Peer) -> Result<Next, HandshakeError> {
        match option {
            opt::EXPORT_NAME => return self.export_name(data, agreed, peer),
            opt::GO | opt::INFO => return self.go(option, data, agreed, peer),
            opt::ABORT => return self.abort(),
            opt::LIST => self.list(data, peer)?,
            opt::STRUCTURED_REPLY if data.is_empty() => {
                agreed.structured = true;
                self.reply(option, rep::ACK, &[])?;
            }
            opt::STRUCTURED_REPLY => self.reply(option, rep::ERR_INVALID, b"STRUCTURED_REPLY has no data")?,
            opt::LIST_META_CONTEXT | opt::SET_META_CONTEXT => self.meta_context(option, data, agreed, peer)?,
            _ => self.reply(option, rep::ERR_UNSUP, b"this option is not supported here")?,
        }
        Ok(Next::Option)
    }

    fn reply(&self, option: u32, kind: u32, data: &[u8]) -> Result<(), HandshakeError> {
        let mut message = Vec::with_capacity(20 + data.len());
        push_reply(&mut message, option, kind, data);
        Ok(self.stream.send(&message)?)
    }

    fn list(&self, data: &[u8], peer: &Peer) -> Result<(), HandshakeError> {
        if !data.is_empty() {
            return self.reply(opt::LIST, rep::ERR_INVALID, b"LIST has no data");
        }
        let mut message = Vec::new();
        for name in self.provider.names(peer) {
            let mut entry = Vec::with_capacity(4 + name.len());
            entry.extend((name.len() as u32).to_be_bytes());
            entry.extend(name.as_bytes());
            push_reply(&mut message, opt::LIST, rep::SERVER, &entry);
        }
        push_reply(&mut message, opt::LIST, rep::ACK, &[]);
        Ok(self.stream.send(&message)?)
    }

    fn open(&self, name: &str, peer: &Peer) -> Result<Arc<dyn Export>, (u32, String)> {
        self.provider.open(name, peer).map_err(|error| {
            let kind = match error {
                OpenError::Unknown { .. } => rep::ERR_UNKNOWN,
                OpenError::Forbidden { .. } => rep::ERR_POLICY,
                OpenError::Unavailable { .. } => rep::ERR_PLATFORM,
            };
            (kind, error.to_string())
        })
    }

    fn lease(&self, name: &str) -> Result<Lease, (u32, String)> {
        let most = self.limits.connections_per_export_max;
        self.registry.lease(self.connection, name, self.limits).ok_or_else(|| {
            if self.registry.is_stopping() {
                (rep::ERR_SHUTDOWN, "this server is stopping".to_owned())
            } else {
                (rep::ERR_POLICY, format!("export {name:?} is open {most} times, which is the limit"))
            }
        })
    }

    /// INFO and GO: export name, then which information is wanted.
    fn go(&self, option: u32, data: &[u8], agreed: &Agreed, peer: &Peer) -> Result<Next, HandshakeError> {
        let mut fields = Fields(data);
        let parsed = (|| {
            let name = fields.string().filter(|name| name.len() <= wire::NAME_BYTES_MAX)?;
            let count = usize::from(fields.u16()?);
            let wanted = fields.bytes(count * 2)?;
            fields.0.is_empty().then_some((name, wanted))
        })();
        let Some((name, wanted)) = parsed else {
            self.reply(option, rep::ERR_INVALID, b"malformed option")?;
            return Ok(Next::Option);
        };
        // The lease comes first: whoever closes an export then also sees connections that are about to open it.
        let lease = if option == opt::GO { self.lease(name).map(Some) } else { Ok(None) };
        let (export, lease) = match lease.and_then(|lease| Ok((self.open(name, peer)?, lease))) {
            Ok(opened) => opened,
            Err((kind, reason)) => {
                self.reply(option, kind, reason.as_bytes())?;
                return Ok(Next::Option);
            }
        };
        let mut message = Vec::new();
        let mut entry = Vec::with_capacity(14);
        entry.extend(info::EXPORT.to_be_bytes());
        entry.extend(export.bytes().to_be_bytes());
        entry.extend(transmission_flags(&*export, agreed.structured).to_be_bytes());
        push_reply(&mut message, option, rep::INFO, &entry);
        entry.clear();
        entry.extend(info::BLOCK_SIZE.to_be_bytes());
        let block_bytes_min = export.block_bytes_min();
        for bytes in [block_bytes_min, block_bytes_min.max(4096), self.limits.request_bytes_max] {
            entry.extend(bytes.to_be_bytes());
        }
        push_reply(&mut message, option, rep::INFO, &entry);
        if wanted.chunks_exact(2).any(|kind| wire::u16_at(kind, 0) == info::NAME) {
            entry.clear();
            entry.extend(info::NAME.to_be_bytes());
            entry.extend(name.as_bytes());
            push_reply(&mut message, option, rep::INFO, &entry);
        }
        push_reply(&mut message, option, rep::ACK, &[]);
        self.stream.send(&message)?;
        Ok(match lease {
            Some(lease) => Next::Transmission(Box::new(negotiated(export, lease, name, agreed, peer))),
            None => Next::Option,
        })
    }

    /// The old way to choose, which knows no error but the end of the connection.
    fn export_name(&self, data: &[u8], agreed: &Agreed, peer: &Peer) -> Result<Next, HandshakeError> {
        let name = std::str::from_utf8(data)
            .ok()
            .filter(|name| name.len() <= wire::NAME_BYTES_MAX)
            .ok_or(HandshakeError::Protocol("malformed export name"))?;
        let opened = self.lease(name).and_then(|lease| Ok((self.open(name, peer)?, lease)));
        let Ok((export, lease)) = opened else {
            return Err(HandshakeError::Protocol("EXPORT_NAME of an export that cannot be opened"));
        };
        let mut message = Vec::with_capacity(134);
        message.extend(export.bytes().to_be_bytes());
        message.extend(transmission_flags(&*export, agreed.structured).to_be_bytes());
        if !agreed.no_zeroes {
            message.extend([0; 124]);
        }
        self.stream.send(&message)?;
        Ok(Next::Transmission(Box::new(negotiated(export, lease, name, agreed, peer))))
    }

    fn meta_context(&self, option: u32, data: &[u8], agreed: &mut Agreed, peer: &Peer) -> Result<(), HandshakeError> {
        let set = option == opt::SET_META_CONTEXT;
        if set {
            // Also a SET that fails ends what an earlier one selected.
            agreed.allocation_of = None;
        }
        if !agreed.structured {
            return self.reply(option, rep::ERR_INVALID, b"structured replies come first");
        }
        let mut fields = Fields(data);
        let parsed = (|| {
            let name = fields.string().filter(|name| name.len() <= wire::NAME_BYTES_MAX)?;
            // Not collected: the count is the client's word, the queries are there or not.
            let count = fields.u32()?;
            let mut found = count == 0 && !set;
            for _ in 0..count {
                let query = fields.string()?;
                found |= query == wire::BASE_ALLOCATION || (!set && query == "base:");
            }
            fields.0.is_empty().then_some((name, found))
        })();
        let Some((name, found)) = parsed else {
            return self.reply(option, rep::ERR_INVALID, b"malformed option");
        };
        if let Err((kind, reason)) = self.open(name, peer) {
            return self.reply(option, kind, reason.as_bytes());
        }
        let mut message = Vec::new();
        if found {
            let id = if set { wire::BASE_ALLOCATION_ID } else { 0 };
            let mut entry = id.to_be_bytes().to_vec();
            entry.extend(wire::BASE_ALLOCATION.as_bytes());
            push_reply(&mut message, option, rep::META_CONTEXT, &entry);
            if set {
                agreed.allocation_of = Some(name.to_owned());
            }
        }
        push_reply(&mut message, option, rep::ACK, &[]);
        Ok(self.stream.send(&message)?)
    }
}

fn negotiated(export: Arc<dyn Export>, lease: Lease, name: &str, agreed: &Agreed, peer: &Peer) -> Negotiated {
    Negotiated {
        export,
        lease,
        peer: peer.clone(),
        structured: agreed.structured,
        // Contexts hold for the export that they were selected for.
        allocation: agreed.allocation_of.as_deref() == Some(name),
    }
}

fn push_reply(message: &mut Vec<u8>, option: u32, kind: u32, data: &[u8]) {
    message.extend(wire::REPLY_MAGIC_OPTION.to_be_bytes());
    message.extend(option.to_be_bytes());
    message.extend(kind.to_be_bytes());
    message.extend((data.len() as u32).to_be_bytes());
    message.extend(data);
}

fn transmission_flags(export: &dyn Export, structured: bool) -> u16 {
    use wire::flag::*;
    let mut flags = HAS_FLAGS | SEND_FLUSH;
    if export.is_read_only() {
        flags |= READ_ONLY;
    } else {
        flags |= SEND_FUA | SEND_TRIM | SEND_WRITE_ZEROES;
        if export.zeroes_fast() {
            flags |= SEND_FAST_ZERO;
        }
    }
    if export.multi_conn() {
        flags |= CAN_MULTI_CONN;
    }
    if structured {
        flags |= SEND_DF;
    }
    flags
}
