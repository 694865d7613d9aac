//! What clients are told: the addresses of exports, and the names that a listener's certificate needs for them.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;

/// An export on a Unix socket.
pub fn unix_uri(name: &str, socket: &Path) -> String {
    format!("nbd+unix:///{}?socket={}", encode(name), encode(&socket.to_string_lossy()))
}

/// An export over TCP with TLS, for a client that has what is in `certificates`.
pub fn tls_uri(name: &str, address: SocketAddr, certificates: &Path) -> String {
    let host = match address.ip() {
        ip if ip.is_unspecified() => own_name().unwrap_or_else(|| "localhost".to_owned()),
        IpAddr::V6(ip) => format!("[{ip}]"),
        ip => ip.to_string(),
    };
    let folder = encode(&certificates.to_string_lossy());
    format!("nbds://{host}:{}/{}?tls-certificates={folder}", address.port(), encode(name))
}

/// The names and addresses under which clients can reach a listener at `address`.
pub fn certificate_names(address: IpAddr) -> Vec<String> {
    let mut names = vec!["localhost".to_owned()];
    if address.is_unspecified() {
        names.extend(["127.0.0.1".to_owned(), "::1".to_owned()]);
        names.extend(own_name());
    } else {
        names.push(address.to_string());
    }
    names
}

fn own_name() -> Option<String> {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").ok()?.trim().to_owned();
    let is_dns = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-.".contains(&byte));
    is_dns.then_some(name)
}

/// Percent-encodes what does not belong into a URI's path or query; a path stays readable.
fn encode(text: &str) -> String {
    let mut encoded = String::new();
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => encoded.push(byte as char),
            byte => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_paths_are_encoded() {
        assert_eq!(
            unix_uri("web 1-0", Path::new("/run/a&b/nbd.sock")),
            "nbd+unix:///web%201-0?socket=/run/a%26b/nbd.sock"
        );
        let address = "[::1]:10809".parse().unwrap();
        assert_eq!(tls_uri("a", address, Path::new("/x y")), "nbds://[::1]:10809/a?tls-certificates=/x%20y");
    }
}
