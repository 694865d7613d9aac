//! Compiles the `.proto` files with protox, a compiler written in Rust, so that no `protoc` is needed to build.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=tidemark");
    let files =
        ["tidemark/replication.proto", "tidemark/failback.proto", "tidemark/control.proto", "tidemark/health.proto"];
    let files = protox::compile(files, ["."])?;
    tonic_prost_build::configure()
        // Payloads are slices of the message that carried them, never copies.
        .bytes(".tidemark.replication.v1.Data.chunks")
        .bytes(".tidemark.failback.v1.BlocksReply.chunks")
        .bytes(".tidemark.replication.v1.HashedRun.hashes")
        .bytes(".tidemark.replication.v1.DifferingRun.hashes")
        .compile_fds(files)?;
    Ok(())
}
