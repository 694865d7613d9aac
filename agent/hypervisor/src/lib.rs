//! What a failover needs of a hypervisor, behind one trait.
//!
//! ```text
//! control → drill ─┐
//! control → failover ─→ Hypervisor (trait) ─┬─ qemu      QEMU run by us over QMP: the embedded default
//!                                           ├─ libvirt   virsh
//!                                           ├─ scripts   hypervisors that others drive: named, root-owned programs
//!                                           └─ disk_only physical servers: the disks, and a person who starts the machine
//! ```
//!
//! * [`machine`]: what a machine is, whatever runs it: firmware, processors, memory, disks in their order, networks.
//! * [`convert`]: generation 2 ↔ generation 1 on the way over and back; each conversion can be taken back.
//! * [`hypervisor`]: the trait, and what its answers look like.
//! * [`guest`]: the guest agent's protocol: ping, freeze with a limit, thaw, exec, shutdown.
//! * [`call`]: what the control plane asks, as it goes over the wire.
//! * [`owner`]: who runs a machine at its home, and shuts it down before a planned failover.
//! * [`drill`]: boot a served point in isolation, wait for a sign of life, keep the evidence, clean up.
//!
//! A machine is known by its id, which we make; its name is for people and becomes no path. Where its disks are is a
//! [`machine::Place`]: a raw file, a block device, or an NBD export on a Unix socket, as served points are.
//!
//! *Consistency.* What was defined is durable before `define` returns; the hypervisor is asked for everything else, so that
//! nothing here can be wrong about a machine that runs. *Retries.* None inside: starting twice is refused, stopping and
//! deleting twice changes nothing. *Cancellation.* A dropped future leaves a machine as far as it came; `delete` of its id
//! ends it from there. *Crash.* Machines are processes of their own and go on; the next process finds them again.

pub mod call;
pub mod convert;
pub mod disk_only;
pub mod drill;
pub mod error;
pub mod guest;
pub mod hypervisor;
pub mod libvirt;
pub mod machine;
pub mod owner;
pub mod qemu;
pub mod run;
pub mod scripts;

pub use error::HypervisorError;
pub use hypervisor::Hypervisor;
pub use machine::{Hardware, Machine, Place};
