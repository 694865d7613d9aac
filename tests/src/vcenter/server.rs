//! HTTPS, a thread for each connection.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use rustls::{ServerConfig, ServerConnection, StreamOwned};
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};

use super::{State, folder, methods};

pub struct Server {
    pub address: SocketAddr,
    pub thumbprint: String,
    pub pem: String,
    connections: Arc<Mutex<Option<Vec<TcpStream>>>>,
    accept: Option<JoinHandle<()>>,
}

impl Server {
    pub fn start(state: Arc<Mutex<State>>, is_old: bool) -> Self {
        let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
        let der = made.cert.der().clone();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
        let versions: &[_] = if is_old { &[&rustls::version::TLS12] } else { rustls::ALL_VERSIONS };
        let config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
            .with_protocol_versions(versions)
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![der.clone()], key)
            .unwrap();
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &der);
        let thumbprint = digest.as_ref().iter().map(|byte| format!("{byte:02X}")).collect::<Vec<_>>().join(":");
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let connections = Arc::new(Mutex::new(Some(Vec::<TcpStream>::new())));
        let (config, open) = (Arc::new(config), connections.clone());
        let accept = std::thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(stream) = stream else { continue };
                let _ = stream.set_nodelay(true);
                match &mut *open.lock().unwrap() {
                    Some(open) => open.push(stream.try_clone().unwrap()),
                    None => break,
                }
                let (config, state) = (config.clone(), state.clone());
                std::thread::spawn(move || {
                    let Ok(connection) = ServerConnection::new(config) else { return };
                    let mut stream = BufReader::new(StreamOwned::new(connection, stream));
                    while let Some(true) = answer(&mut stream, &state) {}
                    let _ = stream.get_ref().sock.shutdown(Shutdown::Both);
                });
            }
        });
        Self { address, thumbprint, pem: made.cert.pem(), connections, accept: Some(accept) }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let open = self.connections.lock().unwrap().take();
        open.into_iter().flatten().for_each(|stream| drop(stream.shutdown(Shutdown::Both)));
        let _ = TcpStream::connect(self.address);
        if let Some(accept) = self.accept.take() {
            let _ = accept.join();
        }
    }
}

/// One request; whether another one may follow.
fn answer(stream: &mut BufReader<StreamOwned<ServerConnection, TcpStream>>, state: &Mutex<State>) -> Option<bool> {
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line).ok()? == 0 {
            return None;
        }
        let line = line.trim_end().to_owned();
        if line.is_empty() {
            break;
        }
        lines.push(line);
    }
    let header = |name: &str| {
        let all = lines.iter().skip(1).filter_map(|line| line.split_once(": "));
        all.filter(|(found, _)| found.eq_ignore_ascii_case(name)).map(|(_, value)| value.to_owned()).next()
    };
    let mut words = lines.first()?.split(' ');
    let (verb, target) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut body = vec![0; header("content-length").and_then(|length| length.parse().ok()).unwrap_or(0)];
    stream.read_exact(&mut body).ok()?;
    let cookie = header("cookie");
    let session = cookie.as_deref().and_then(|cookie| cookie.strip_prefix("vmware_soap_session=\"")?.strip_suffix('"'));
    let mut state = state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some(left) = &mut state.faults.sessions_end_after {
        *left = left.saturating_sub(1);
        if *left == 0 {
            state.faults.sessions_end_after = None;
            state.sessions.clear();
        }
    }
    let told = match (verb.as_str(), target.as_str()) {
        ("POST", "/sdk") => {
            let told = methods::call(&mut state, &String::from_utf8(body).unwrap(), session);
            let mut headers = vec!["Content-Type: text/xml; charset=utf-8".to_owned()];
            if let Some(session) = told.cookie {
                headers.push(format!("Set-Cookie: vmware_soap_session=\"{session}\"; Path=/; HttpOnly; Secure;"));
            }
            folder::File { status: told.status, headers, body: told.body.into_bytes(), cut_at: None }
        }
        ("GET", target) if target.starts_with("/folder/") => {
            folder::read(&mut state, target, header("range").as_deref(), session)
        }
        _ => folder::File { status: 404, headers: Vec::new(), body: Vec::new(), cut_at: None },
    };
    drop(state);
    let mut head = format!("HTTP/1.1 {} told\r\nContent-Length: {}\r\n", told.status, told.body.len());
    told.headers.iter().for_each(|header| head.push_str(&format!("{header}\r\n")));
    head.push_str("\r\n");
    let sent = &told.body[..told.cut_at.unwrap_or(told.body.len())];
    let stream = stream.get_mut();
    stream.write_all(&[head.as_bytes(), sent].concat()).ok()?;
    stream.flush().ok()?;
    Some(told.cut_at.is_none())
}
