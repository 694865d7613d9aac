//! How a vCenter (or an ESXi host alone) is reached: one file for each, read anew at each login, so that a changed password needs no restart.
//!
//! The password is in a file or the environment of the agent, never in an argument, a log or a message.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use crate::error::VsphereError;

/// In the agent's state folder.
pub const FOLDER: &str = "vsphere.d";

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Written {
    url: String,
    user: String,
    password_file: Option<PathBuf>,
    password_env: Option<String>,
    thumbprint: Option<String>,
    ca_file: Option<PathBuf>,
    interval: Option<String>,
    #[serde(default = "reads_max")]
    reads_max: usize,
    #[serde(default)]
    read_bytes_per_second: u64,
    #[serde(default = "snapshots_max")]
    snapshots_max: usize,
    #[serde(default = "free_bytes_min")]
    free_bytes_min: u64,
}

fn reads_max() -> usize {
    4
}

fn snapshots_max() -> usize {
    2
}

fn free_bytes_min() -> u64 {
    4 << 30
}

/// Each snapshot makes the machine stand still for a moment.
pub const INTERVAL: Duration = Duration::from_secs(60);
const FILE_BYTES_MAX: u64 = 64 << 10;

/// Is shown nowhere.
#[derive(Clone, PartialEq, Eq)]
pub struct Password(String);

impl Password {
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(hidden)")
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Trust {
    /// SHA-256 of the server's certificate.
    Thumbprint([u8; 32]),
    Authorities(PathBuf),
    /// Nothing was said yet: whoever answers is refused, with its thumbprint.
    Nobody,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Settings {
    pub host: String,
    pub port: u16,
    pub user: String,
    pub password: Password,
    pub trust: Trust,
    pub interval: Duration,
    pub reads_max: usize,
    pub read_bytes_per_second: u64,
    pub snapshots_max: usize,
    pub free_bytes_min: u64,
}

impl Settings {
    pub fn read(path: &Path) -> Result<Self, VsphereError> {
        let wrong = |reason: String| VsphereError::WrongSettings { path: path.to_owned(), reason };
        is_safe(path, 0o022)?;
        // What the parser says would show the line that it stopped at.
        let written: Written = toml::from_str(&text(path)?).map_err(|error| wrong(error.message().to_owned()))?;
        let address = written.url.strip_prefix("https://").ok_or_else(|| wrong("`url` is not https://…".into()))?;
        let address = address.strip_suffix("/sdk").unwrap_or(address).trim_end_matches('/');
        let (host, port) =
            split(address).ok_or_else(|| wrong("`url` is not https://HOST or https://HOST:PORT".into()))?;
        let password = match (&written.password_file, &written.password_env) {
            (Some(file), None) => {
                is_safe(file, 0o077)?;
                text(file)?.trim_end_matches(['\r', '\n']).to_owned()
            }
            (None, Some(name)) => std::env::var(name).map_err(|_| wrong(format!("the environment has no {name}")))?,
            _ => return Err(wrong("name one of `password-file` and `password-env`".into())),
        };
        let trust = match (written.thumbprint, written.ca_file) {
            (Some(text), None) => Trust::Thumbprint(
                thumbprint(&text).ok_or_else(|| wrong("`thumbprint` is not the SHA-256 of a certificate".into()))?,
            ),
            (None, Some(file)) => Trust::Authorities(file),
            (None, None) => Trust::Nobody,
            (Some(_), Some(_)) => return Err(wrong("name one of `thumbprint` and `ca-file`".into())),
        };
        let interval = written.interval.as_deref().map(humantime::parse_duration).transpose();
        let interval = interval.map_err(|error| wrong(format!("`interval`: {error}")))?.unwrap_or(INTERVAL);
        Ok(Self {
            host,
            port,
            user: written.user,
            password: Password(password),
            trust,
            interval,
            reads_max: written.reads_max.clamp(1, 64),
            read_bytes_per_second: written.read_bytes_per_second,
            snapshots_max: written.snapshots_max.clamp(1, 16),
            free_bytes_min: written.free_bytes_min,
        })
    }

    pub fn server(&self) -> String {
        match self.port {
            443 => self.host.clone(),
            port => format!("{}:{port}", self.host),
        }
    }
}

fn split(address: &str) -> Option<(String, u16)> {
    let (host, port) = match address.strip_prefix('[') {
        // An IPv6 address.
        Some(rest) => {
            let (host, rest) = rest.split_once(']')?;
            (host, rest.strip_prefix(':').or(rest.is_empty().then_some("443"))?)
        }
        None => address.split_once(':').unwrap_or((address, "443")),
    };
    let is_host = !host.is_empty() && !host.contains(['/', '@', '?', '#', ' ']);
    Some((host.to_owned(), port.parse().ok()?)).filter(|_| is_host)
}

/// As browsers and `openssl x509 -fingerprint -sha256` show it, or without colons.
pub fn thumbprint(text: &str) -> Option<[u8; 32]> {
    let digits: Vec<u8> = text.bytes().filter(|byte| *byte != b':').collect();
    let mut bytes = [0; 32];
    if digits.len() != 64 || !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(bytes)
}

fn text(path: &Path) -> Result<String, VsphereError> {
    let failed = |source| VsphereError::Settings { path: path.to_owned(), source };
    let bytes = std::fs::metadata(path).map_err(failed)?.len();
    if bytes > FILE_BYTES_MAX {
        let reason = format!("it has {bytes} bytes, at most {FILE_BYTES_MAX} are expected");
        return Err(VsphereError::WrongSettings { path: path.to_owned(), reason });
    }
    std::fs::read_to_string(path).map_err(failed)
}

/// Whoever can change it can have our password sent elsewhere.
#[cfg(unix)]
fn is_safe(path: &Path, forbidden: u32) -> Result<(), VsphereError> {
    use std::os::unix::fs::MetadataExt;
    let found = std::fs::metadata(path).map_err(|source| VsphereError::Settings { path: path.to_owned(), source })?;
    let refused = |reason: String| Err(VsphereError::Unsafe { path: path.to_owned(), reason });
    if found.uid() != 0 && found.uid() != nix::unistd::Uid::effective().as_raw() {
        return refused(format!("it belongs to user {}", found.uid()));
    }
    match found.mode() & forbidden {
        0 => Ok(()),
        _ => refused(format!("its mode is {:o}", found.mode() & 0o777)),
    }
}

/// Access lists of Windows are the administrator's: the state folder has its own.
#[cfg(not(unix))]
fn is_safe(_path: &Path, _forbidden: u32) -> Result<(), VsphereError> {
    Ok(())
}

#[cfg(all(test, unix))]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn write(path: &Path, text: &str, mode: u32) {
        std::io::Write::write_all(&mut std::fs::File::create(path).unwrap(), text.as_bytes()).unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn settings_that_others_can_read_or_change_are_refused_and_no_password_is_shown() {
        let folder = tempfile::tempdir().unwrap();
        let (settings, password) = (folder.path().join("lab.toml"), folder.path().join("password"));
        write(&password, "s3cr3t-word\n", 0o600);
        let common = format!("url = \"https://vc.lab:8443/sdk\"\nuser = \"u\"\npassword-file = {password:?}\n");
        write(&settings, &common, 0o644);
        let read = Settings::read(&settings).unwrap();
        assert_eq!((&*read.host, read.port, &read.trust), ("vc.lab", 8443, &Trust::Nobody));
        assert_eq!(read.password.reveal(), "s3cr3t-word");
        assert!(!format!("{read:?}").contains("s3cr3t"));
        write(&password, "s3cr3t-word\n", 0o644);
        assert!(matches!(Settings::read(&settings), Err(VsphereError::Unsafe { .. })), "a password that all can read");
        write(&password, "s3cr3t-word\n", 0o600);
        write(&settings, &common, 0o666);
        assert!(matches!(Settings::read(&settings), Err(VsphereError::Unsafe { .. })), "settings that all can change");
        let broken = [
            "url = \"http://vc.lab\"\nuser = \"u\"\npassword-env = \"HOME\"\n",
            "url = \"https://vc.lab\"\nuser = \"u\"\n",
            "url = \"https://vc.lab\"\nuser = \"u\"\npassword-env = \"HOME\"\nthumbprint = \"AB:CD\"\n",
            "url = \"https://vc.lab\"\nuser = \"u\"\npassword = \"s3cr3t-word\"\n",
            "url = \"https://u:s3cr3t-word@vc.lab\"\nuser = \"u\"\npassword-env = \"HOME\"\n",
            "url = \"https://vc.lab\"\nuser = \"u\"\npassword-env = \"HOME\"\npassword-file = s3cr3t-word\n",
        ];
        for text in broken {
            write(&settings, text, 0o600);
            let error = Settings::read(&settings).unwrap_err();
            assert!(matches!(error, VsphereError::WrongSettings { .. }), "{error}");
            assert!(!format!("{error} {error:?} {}", error.help()).contains("s3cr3t"), "{error}");
        }
    }

    #[test]
    fn thumbprints_are_read_as_they_are_shown() {
        let shown = (0..32).map(|byte: u8| format!("{byte:02X}")).collect::<Vec<_>>();
        let bytes: Vec<u8> = (0..32).collect();
        assert_eq!(thumbprint(&shown.join(":")).unwrap().to_vec(), bytes);
        assert_eq!(thumbprint(&shown.concat().to_lowercase()).unwrap().to_vec(), bytes);
        assert_eq!(thumbprint(&shown[1..].join(":")), None);
        assert_eq!(thumbprint(&"x".repeat(64)), None);
    }

    #[test]
    fn addresses_are_split() {
        assert_eq!(split("vc"), Some(("vc".into(), 443)));
        assert_eq!(split("[::1]:7"), Some(("::1".into(), 7)));
        assert_eq!(split("[fe80::1]"), Some(("fe80::1".into(), 443)));
        for wrong in ["", ":1", "vc:port", "vc/other", "[::1", "[::1]x"] {
            assert_eq!(split(wrong), None, "{wrong}");
        }
    }
}
