#![doc = include_str!("FORMAT.md")]
//!
//! *Consistency.* A backup is whole and of this installation, or it is refused. *Retries*, *Cancellation*, *Crash*: nothing
//! is kept here.

use std::fmt;

use aws_lc_rs::agreement::{PrivateKey, X25519};
use aws_lc_rs::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use rustls::crypto::aws_lc_rs::hpke::DH_KEM_X25519_HKDF_SHA256_AES_256;
use rustls::crypto::hpke::{EncapsulatedSecret, Hpke, HpkePrivateKey, HpkePublicKey};

const MAGIC: &[u8; 8] = b"TMBACKUP";
const VERSION: u32 = 1;
const PREFIX: &str = "tidemark-recovery-";
const GROUP: usize = 8;
/// A head is a few lines.
const HEAD_BYTES_MAX: usize = 64 << 10;
const FRONT_BYTES: usize = 16;
const SECRET_BYTES: usize = 32;
/// A secret key with the seal's tag.
const WRAPPED_BYTES: usize = SECRET_BYTES + 16;
const INFO_KEY: &[u8] = b"tidemark backup 1: the envelope's key";
const INFO_BODY: &[u8] = b"tidemark backup 1: the body";

fn suite() -> &'static dyn Hpke {
    DH_KEM_X25519_HKDF_SHA256_AES_256
}

#[derive(Debug, thiserror::Error)]
pub enum RecoveryError {
    #[error("that is no recovery key: {0}")]
    Key(&'static str),
    #[error("the backup cannot be read: {0}")]
    Damaged(&'static str),
    #[error("the backup was written by a newer Tidemark (version {0} of its format, this one knows {VERSION})")]
    Newer(u32),
    #[error("the backup is not one that this recovery key opens, or it was changed")]
    Foreign,
    #[error("the system's cryptography failed: {0}")]
    Failed(&'static str),
}

impl RecoveryError {
    pub fn help(&self) -> &'static str {
        match self {
            RecoveryError::Key(_) => {
                "give the recovery key as `tidemark config-server init` showed it, or the file that holds it"
            }
            RecoveryError::Damaged(_) => "take another backup: every process server keeps some in `config-backups`",
            RecoveryError::Newer(_) => "use the version of Tidemark that wrote it, or a newer one",
            RecoveryError::Foreign => {
                "use the recovery key that was in force when the backup was made (`key` in its head), or another backup"
            }
            RecoveryError::Failed(_) => "check the system's source of randomness",
        }
    }
}

/// What opens everything. Printed by [`RecoveryKey::text`] alone.
pub struct RecoveryKey {
    seed: [u8; 32],
}

impl fmt::Debug for RecoveryKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RecoveryKey")
    }
}

impl RecoveryKey {
    pub fn generate() -> Result<Self, RecoveryError> {
        let mut seed = [0; 32];
        aws_lc_rs::rand::fill(&mut seed).map_err(|_| RecoveryError::Failed("no randomness"))?;
        Ok(Self { seed })
    }

    /// As [`RecoveryKey::text`] writes it; spaces, case and the first word do not matter.
    pub fn parse(text: &str) -> Result<Self, RecoveryError> {
        let text = text.trim().to_ascii_lowercase();
        let text = text.strip_prefix(PREFIX).unwrap_or(&text);
        let digits: String = text.chars().filter(|letter| !letter.is_whitespace() && *letter != '-').collect();
        if digits.len() != 64 + GROUP || !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return Err(RecoveryError::Key("it is 72 hexadecimal digits in groups"));
        }
        let mut seed = [0; 32];
        for (place, byte) in seed.iter_mut().enumerate() {
            let digits = digits.get(2 * place..2 * place + 2).unwrap_or_default();
            *byte = u8::from_str_radix(digits, 16).map_err(|_| RecoveryError::Key("it is hexadecimal"))?;
        }
        let key = Self { seed };
        match key.check() == digits[64..] {
            true => Ok(key),
            false => Err(RecoveryError::Key("a letter of it is wrong")),
        }
    }

    fn check(&self) -> String {
        blake3::hash(&self.seed).to_hex()[..GROUP].to_owned()
    }

    /// For a person to keep.
    pub fn text(&self) -> String {
        let digits: String = self.seed.iter().map(|byte| format!("{byte:02x}")).collect();
        let groups: Vec<&str> = (0..64 / GROUP).map(|group| &digits[group * GROUP..(group + 1) * GROUP]).collect();
        format!("{PREFIX}{}-{}", groups.join("-"), self.check())
    }

    fn derive(&self, what: &str) -> [u8; 32] {
        blake3::derive_key(&format!("Tidemark 2026-11-22 recovery key: {what}"), &self.seed)
    }

    fn signing(&self) -> Result<Ed25519KeyPair, RecoveryError> {
        Ed25519KeyPair::from_seed_unchecked(&self.derive("break glass"))
            .map_err(|_| RecoveryError::Failed("no signing key"))
    }

    /// What the configuration server keeps.
    pub fn keeper(&self) -> Result<Keeper, RecoveryError> {
        let failed = |_| RecoveryError::Failed("no public key");
        let secret = PrivateKey::from_private_key(&X25519, &self.derive("encryption"))
            .map_err(|_| RecoveryError::Failed("no secret key"))?;
        let encryption = secret.compute_public_key().map_err(failed)?;
        let array = |bytes: &[u8]| bytes.try_into().map_err(|_| RecoveryError::Failed("a key of another length"));
        Ok(Keeper {
            encryption: array(encryption.as_ref())?,
            authentication: self.derive("authentication"),
            break_glass: array(self.signing()?.public_key().as_ref())?,
        })
    }

    /// A failover without a configuration server is signed with it.
    pub fn sign(&self, message: &[u8]) -> Result<Vec<u8>, RecoveryError> {
        Ok(self.signing()?.sign(message).as_ref().to_vec())
    }

    /// The head and the content of a backup.
    pub fn open(&self, sealed: &[u8]) -> Result<(Vec<u8>, Vec<u8>), RecoveryError> {
        let parts = Parts::of(sealed)?;
        if !parts.is_authentic(&self.derive("authentication")) {
            return Err(RecoveryError::Foreign);
        }
        let wrapped = EncapsulatedSecret(parts.wrapped_secret.to_vec());
        let recovery = HpkePrivateKey::from(self.derive("encryption").to_vec());
        let envelope = suite()
            .open(&wrapped, INFO_KEY, parts.front, parts.wrapped, &recovery)
            .map_err(|_| RecoveryError::Foreign)?;
        let content = parts.body(&HpkePrivateKey::from(envelope))?;
        Ok((parts.head().to_vec(), content))
    }
}

/// Whether a signature is of the key whose public half this is.
pub fn verify_break_glass(public: &[u8], message: &[u8], signature: &[u8]) -> bool {
    UnparsedPublicKey::new(&ED25519, public).verify(message, signature).is_ok()
}

/// What makes backups, and cannot read them.
#[derive(Clone, PartialEq, Eq)]
pub struct Keeper {
    encryption: [u8; 32],
    authentication: [u8; 32],
    break_glass: [u8; 32],
}

impl fmt::Debug for Keeper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Keeper({})", self.id())
    }
}

/// A backup, and what opens it this once.
pub struct Sealed {
    pub bytes: Vec<u8>,
    envelope: HpkePrivateKey,
    keeper: Keeper,
}

impl Keeper {
    /// Which recovery key it is of, for people.
    pub fn id(&self) -> String {
        blake3::hash(&self.encryption).to_hex()[..16].to_owned()
    }

    /// For the server's folder: it holds the authentication key.
    pub fn to_text(&self) -> String {
        let parts = [self.encryption, self.authentication, self.break_glass];
        parts.iter().flatten().map(|byte| format!("{byte:02x}")).collect()
    }

    pub fn from_text(text: &str) -> Result<Self, RecoveryError> {
        let wrong = || RecoveryError::Damaged("what is kept of the recovery key");
        let text = text.trim();
        if text.len() != 192 || !text.is_ascii() {
            return Err(wrong());
        }
        let part = |from: usize| -> Result<[u8; 32], RecoveryError> {
            let mut part = [0; 32];
            for (place, byte) in part.iter_mut().enumerate() {
                let at = 64 * from + 2 * place;
                *byte = u8::from_str_radix(&text[at..at + 2], 16).map_err(|_| wrong())?;
            }
            Ok(part)
        };
        Ok(Self { encryption: part(0)?, authentication: part(1)?, break_glass: part(2)? })
    }

    /// The public half of the key that signs failovers.
    pub fn break_glass(&self) -> [u8; 32] {
        self.break_glass
    }

    pub fn seal(&self, head: &[u8], content: &[u8]) -> Result<Sealed, RecoveryError> {
        let failed = |_| RecoveryError::Failed("sealing");
        let head_bytes = u32::try_from(head.len()).map_err(|_| RecoveryError::Failed("the head is too long"))?;
        let mut bytes = Vec::with_capacity(content.len() + head.len() + 256);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&head_bytes.to_le_bytes());
        bytes.extend_from_slice(head);
        let front = bytes.clone();
        let (public, envelope) = suite().generate_key_pair().map_err(failed)?;
        let recovery = HpkePublicKey(self.encryption.to_vec());
        let (secret, wrapped) = suite().seal(INFO_KEY, &front, envelope.secret_bytes(), &recovery).map_err(failed)?;
        bytes.extend_from_slice(&secret.0);
        bytes.extend_from_slice(&wrapped);
        let (secret, body) = suite().seal(INFO_BODY, &front, content, &public).map_err(failed)?;
        bytes.extend_from_slice(&secret.0);
        bytes.extend_from_slice(&(body.len() as u64).to_le_bytes());
        bytes.extend_from_slice(&body);
        let mac = blake3::keyed_hash(&self.authentication, &bytes);
        bytes.extend_from_slice(mac.as_bytes());
        Ok(Sealed { bytes, envelope, keeper: self.clone() })
    }

    /// Whether a backup is one of this installation, and whole. What is in it is not read.
    pub fn is_ours(&self, sealed: &[u8]) -> bool {
        Parts::of(sealed).is_ok_and(|parts| parts.is_authentic(&self.authentication))
    }
}

impl Sealed {
    /// Opens what was read back from where it was written: its content.
    pub fn check(&self, read_back: &[u8]) -> Result<Vec<u8>, RecoveryError> {
        let parts = Parts::of(read_back)?;
        if !parts.is_authentic(&self.keeper.authentication) || read_back != self.bytes {
            return Err(RecoveryError::Damaged("it is not what was written"));
        }
        parts.body(&self.envelope)
    }
}

/// The head of a backup, which anybody can read: nothing proves it.
pub fn unproven_head(sealed: &[u8]) -> Result<&[u8], RecoveryError> {
    Ok(Parts::of(sealed)?.head())
}

struct Parts<'a> {
    all: &'a [u8],
    front: &'a [u8],
    wrapped_secret: &'a [u8],
    wrapped: &'a [u8],
    body_secret: &'a [u8],
    body: &'a [u8],
    mac: [u8; 32],
}

impl<'a> Parts<'a> {
    fn of(all: &'a [u8]) -> Result<Self, RecoveryError> {
        let short = || RecoveryError::Damaged("it is cut short");
        let number = |at: usize| -> Result<u32, RecoveryError> {
            let bytes = all.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).ok_or_else(short)?;
            Ok(u32::from_le_bytes(bytes))
        };
        if all.get(..8) != Some(MAGIC.as_slice()) {
            return Err(RecoveryError::Damaged("it is no backup of Tidemark's configuration"));
        }
        match number(8)? {
            VERSION => {}
            0 => return Err(RecoveryError::Damaged("its version is 0")),
            version => return Err(RecoveryError::Newer(version)),
        }
        let head = number(12)? as usize;
        if head > HEAD_BYTES_MAX {
            return Err(RecoveryError::Damaged("its head is too long"));
        }
        let mut rest = all;
        let mut take = |bytes: usize| -> Result<&'a [u8], RecoveryError> {
            let (taken, after) = rest.split_at_checked(bytes).ok_or_else(short)?;
            rest = after;
            Ok(taken)
        };
        let front = take(FRONT_BYTES + head)?;
        let (wrapped_secret, wrapped, body_secret) = (take(SECRET_BYTES)?, take(WRAPPED_BYTES)?, take(SECRET_BYTES)?);
        let bytes = u64::from_le_bytes(take(8)?.try_into().map_err(|_| short())?);
        let body = take(usize::try_from(bytes).map_err(|_| short())?)?;
        let mac = take(32)?.try_into().map_err(|_| short())?;
        if !rest.is_empty() {
            return Err(RecoveryError::Damaged("something follows it"));
        }
        Ok(Self { all, front, wrapped_secret, wrapped, body_secret, body, mac })
    }

    fn head(&self) -> &'a [u8] {
        &self.front[FRONT_BYTES..]
    }

    fn is_authentic(&self, key: &[u8; 32]) -> bool {
        // `blake3::Hash` compares in constant time.
        blake3::keyed_hash(key, &self.all[..self.all.len() - 32]) == blake3::Hash::from_bytes(self.mac)
    }

    fn body(&self, envelope: &HpkePrivateKey) -> Result<Vec<u8>, RecoveryError> {
        let secret = EncapsulatedSecret(self.body_secret.to_vec());
        suite().open(&secret, INFO_BODY, self.front, self.body, envelope).map_err(|_| RecoveryError::Foreign)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_recovery_key_opens_a_backup_and_every_bit_of_it_counts() {
        let key = RecoveryKey::generate().unwrap();
        let keeper = Keeper::from_text(&key.keeper().unwrap().to_text()).unwrap();
        let sealed = keeper.seal(b"{\"head\":1}", b"the content").unwrap();
        assert_eq!(sealed.check(&sealed.bytes).unwrap(), b"the content");
        let (head, content) = RecoveryKey::parse(&key.text()).unwrap().open(&sealed.bytes).unwrap();
        assert_eq!((head.as_slice(), content.as_slice()), (&b"{\"head\":1}"[..], &b"the content"[..]));
        assert_eq!(unproven_head(&sealed.bytes).unwrap(), b"{\"head\":1}");
        let other = RecoveryKey::generate().unwrap();
        assert!(matches!(other.open(&sealed.bytes), Err(RecoveryError::Foreign)));
        assert!(!other.keeper().unwrap().is_ours(&sealed.bytes) && keeper.is_ours(&sealed.bytes));
        for bit in 0..sealed.bytes.len() * 8 {
            let mut damaged = sealed.bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(key.open(&damaged).is_err() && !keeper.is_ours(&damaged), "bit {bit}");
            assert!(sealed.check(&damaged).is_err(), "bit {bit}");
        }
        for bytes in 0..sealed.bytes.len() {
            assert!(key.open(&sealed.bytes[..bytes]).is_err(), "{bytes} bytes of it");
        }
        assert!(!sealed.bytes.windows(11).any(|window| window == b"the content"));
    }

    #[test]
    fn what_the_server_keeps_makes_backups_and_opens_none() {
        let key = RecoveryKey::generate().unwrap();
        let keeper = key.keeper().unwrap();
        let first = keeper.seal(b"{}", b"one").unwrap();
        let second = keeper.seal(b"{}", b"two").unwrap();
        // The key of another backup is no use.
        let parts = Parts::of(&first.bytes).unwrap();
        assert!(parts.body(&second.envelope).is_err());
        // Neither is anything that it keeps.
        for secret in [keeper.encryption, keeper.authentication, keeper.break_glass] {
            assert!(parts.body(&HpkePrivateKey::from(secret.to_vec())).is_err());
        }
    }

    #[test]
    fn a_mistyped_key_is_refused_and_its_form_does_not_matter() {
        let key = RecoveryKey::generate().unwrap();
        let text = key.text();
        for form in
            [text.to_uppercase(), text.replace('-', " ").replace("tidemark recovery ", ""), format!(" {text}\n")]
        {
            assert_eq!(RecoveryKey::parse(&form).unwrap().text(), text, "{form}");
        }
        let at = PREFIX.len();
        let other = if text.as_bytes()[at] == b'a' { "b" } else { "a" };
        let wrong = format!("{}{other}{}", &text[..at], &text[at + 1..]);
        for wrong in [wrong.as_str(), "", "tidemark-recovery-", &text[..text.len() - 1]] {
            assert!(matches!(RecoveryKey::parse(wrong), Err(RecoveryError::Key(_))), "{wrong}");
        }
    }

    #[test]
    fn a_failover_is_signed_by_the_key_alone() {
        let (key, other) = (RecoveryKey::generate().unwrap(), RecoveryKey::generate().unwrap());
        let public = key.keeper().unwrap().break_glass();
        let signature = key.sign(b"machine 1").unwrap();
        assert!(verify_break_glass(&public, b"machine 1", &signature));
        assert!(!verify_break_glass(&public, b"machine 2", &signature));
        assert!(!verify_break_glass(&public, b"machine 1", &other.sign(b"machine 1").unwrap()));
    }
}
