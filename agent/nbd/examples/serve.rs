//! Serves a raw disk image on a Unix socket: `serve FILE SOCKET [NAME]`, until its standard input ends.

use std::io::Read;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use tidemark_base::disk::{Access, FileDisk};
use tidemark_nbd::{DiskExport, Exports, Limits, Server};

fn main() -> ExitCode {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [file, socket, rest @ ..] = &arguments[..] else {
        eprintln!("usage: serve FILE SOCKET [NAME]");
        return ExitCode::from(2);
    };
    match serve(Path::new(file), Path::new(socket), rest.first().map_or("", |name| name)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("serve: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve(file: &Path, socket: &Path, name: &str) -> Result<(), Box<dyn std::error::Error>> {
    let disk = Arc::new(FileDisk::open(file, Access::Exclusive)?);
    let exports = Arc::new(Exports::new());
    exports.insert(name, Arc::new(DiskExport::of_file(disk)?));
    let server = Server::new(exports, Limits::default());
    server.listen_unix(socket, &[])?;
    println!("nbd+unix:///{name}?socket={}", socket.display());
    std::io::stdin().read_to_end(&mut Vec::new())?;
    server.stop()?;
    Ok(())
}
