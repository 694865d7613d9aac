//! Real faults under the real command, judged by programs that others wrote.

mod calls;
mod database;
mod full;
mod network;
mod power;
mod scenarios;
mod store;
