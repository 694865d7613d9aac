//! What crosses between the roles.

pub mod replication {
    tonic::include_proto!("tidemark.replication.v1");
}
pub mod control;
