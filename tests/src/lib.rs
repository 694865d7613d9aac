//! Whole-system tests: a real `tidemark` on temporary folders, driven through its command line as a user drives it,
//! and other people's tools (qemu-io, nbdcopy, fio) as the workload.
//!
//! * [`site`]: a running `tidemark up` (or three separate roles), its verbs, its end.
//! * [`api`]: its REST API, for what is asked more often than a command can be started.
//! * [`binary`], [`process`]: where the command is, and children that never outlive their test.
//! * [`nbd`]: a client of our own, because only a client that notes when each write was sent and acknowledged can say
//!   what a mark must hold. It shares no code with the product.
//! * [`guest`]: a Linux in QEMU.
//! * [`image`]: disks with content, and the comparison of two of them.
//! * [`block`]: loop devices, mounts, and programs that show a disk as a file, all gone with their test.
//! * [`distance`]: a long way between two programs.
//! * [`owner`]: who runs a machine at its home.
//! * [`postgres`]: a database as a judge of disks.
//! * [`net`]: networks of a test's own, and a proxy that misbehaves.
//! * [`tools`]: programs that a test needs; a test without them says `SKIPPED` and why.
//! * [`trace`]: system calls that fail, or that a process does not survive.
//! * [`vcenter`]: a vCenter with a machine whose disks are files.
//! * [`wait`]: waiting for a condition with a limit.
//! * [`workload`]: what a workload does with its protected disk.
//! * [`writelog`]: what a block device may hold after a power cut.

pub mod api;
pub mod binary;
pub mod block;
pub mod distance;
pub mod guest;
pub mod image;
pub mod nbd;
pub mod net;
pub mod owner;
pub mod postgres;
pub mod process;
pub mod site;
pub mod tools;
pub mod trace;
pub mod vcenter;
pub mod wait;
pub mod workload;
pub mod writelog;

pub use site::{Machine, Site};
