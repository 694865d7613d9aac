//! Passphrases: an id that finds the row, and a secret of which only the hash is kept.

use std::sync::{Condvar, Mutex};

use argon2::password_hash::{PasswordHasher, PasswordVerifier};
use argon2::{Algorithm, Argon2, Params, Version};
use tidemark_proto::control::{Failure, FailureKind};
use uuid::Uuid;

/// OWASP's least for Argon2id; the secret has 122 random bits, so that this is a second wall and not the first.
const MEMORY_KIB: u32 = 19 << 10;
const PASSES: u32 = 2;
/// Each takes its memory, and whoever reaches the address can ask for one: the others wait.
const VERIFIED_AT_ONCE_MAX: usize = 4;
const SECRET_LETTERS: usize = 24;
/// Without letters that look like others.
const LETTERS: &[u8; 32] = b"abcdefghjkmnpqrstuvwxyz123456789";
/// A passphrase that exists nowhere, so that a wrong id takes as long as a wrong secret.
const NOBODY: &str = "$argon2id$v=19$m=19456,t=2,p=1$bm9ib2R5bm9ib2R5$Sdu9dHdVQzgyN3gJbYQC6KcAlX0VKgpFm0yVzsSLBrE";

fn argon2() -> Argon2<'static> {
    let params = Params::new(MEMORY_KIB, PASSES, 1, None).unwrap_or_default();
    Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
}

/// Id, passphrase as it is shown, and hash.
pub fn make() -> Result<(String, String, String), Failure> {
    let failed = |error: &dyn std::fmt::Display| {
        Failure::new(FailureKind::Failed, format!("a passphrase cannot be made: {error}"), "see the log")
    };
    let id: String = Uuid::new_v4().simple().to_string().chars().take(8).collect();
    // Of 32 letters each takes 5 bits, and the fixed bits of one id are covered by another.
    let (one, two) = (Uuid::new_v4(), Uuid::new_v4());
    let bytes = one.as_bytes().iter().zip(two.as_bytes().iter().rev()).map(|(one, two)| one ^ two);
    let more = Uuid::new_v4();
    let random: Vec<u8> = bytes.chain(more.as_bytes()[8..].iter().copied()).collect();
    let letters: Vec<char> =
        random[..SECRET_LETTERS].iter().map(|byte| char::from(LETTERS[usize::from(byte & 31)])).collect();
    let groups: Vec<String> = letters.chunks(6).map(|group| group.iter().collect()).collect();
    let secret: String = letters.iter().collect();
    let salt = Uuid::new_v4();
    let hash = argon2().hash_password_with_salt(secret.as_bytes(), salt.as_bytes()).map_err(|error| failed(&error))?;
    Ok((id.clone(), format!("{id}-{}", groups.join("-")), hash.to_string()))
}

/// Id and secret of a passphrase as somebody typed it.
pub fn parts(text: &str) -> Option<(&str, String)> {
    let (id, rest) = text.trim().split_once('-')?;
    let secret: String = rest.chars().filter(|letter| *letter != '-').take(256).collect();
    (!id.is_empty() && !secret.is_empty()).then_some((id, secret))
}

/// Lets so many work at once. Blocks.
struct Turns {
    taken: Mutex<usize>,
    freed: Condvar,
}

struct Turn<'a>(&'a Turns);

impl Turns {
    const fn new() -> Self {
        Self { taken: Mutex::new(0), freed: Condvar::new() }
    }

    fn wait(&self) -> Turn<'_> {
        let taken = self.taken.lock().expect("no panic while held");
        let mut taken =
            self.freed.wait_while(taken, |taken| *taken >= VERIFIED_AT_ONCE_MAX).expect("no panic while held");
        *taken += 1;
        Turn(self)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *self.0.taken.lock().expect("no panic while held") -= 1;
        self.0.freed.notify_one();
    }
}

static TURNS: Turns = Turns::new();

/// Whether the secret is the one of this hash; takes the same time where there is none. Blocks while others are looked at.
pub fn verify(hash: Option<&str>, secret: String) -> bool {
    let _turn = TURNS.wait();
    let is_right = argon2().verify_password(secret.as_bytes(), hash.unwrap_or(NOBODY)).is_ok();
    is_right && hash.is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_so_many_are_looked_at_at_once() {
        let turns = Turns::new();
        let held: Vec<Turn<'_>> = (0..VERIFIED_AT_ONCE_MAX).map(|_| turns.wait()).collect();
        let (done, waits) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let _turn = turns.wait();
                let _ = done.send(());
            });
            let soon = std::time::Duration::from_millis(200);
            assert!(waits.recv_timeout(soon).is_err(), "one more waits");
            drop(held);
            waits.recv().unwrap();
        });
    }

    #[test]
    fn a_passphrase_is_known_by_its_hash_only() {
        let (id, text, hash) = make().unwrap();
        let typed = format!(" {text}\n");
        let (found, secret) = parts(&typed).unwrap();
        assert_eq!((found, secret.len()), (id.as_str(), SECRET_LETTERS));
        assert!(hash.starts_with("$argon2id$") && !hash.contains(&secret));
        assert!(verify(Some(&hash), secret.clone()));
        assert!(!verify(Some(&hash), format!("{secret}a")) && !verify(None, secret));
        assert!(argon2::password_hash::phc::PasswordHash::new(NOBODY).is_ok(), "a wrong id takes its time as well");
        for text in ["", "abc", "-", "a-", "-a"] {
            assert!(parts(text).is_none(), "{text}");
        }
    }
}
