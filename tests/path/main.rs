//! The path of a write, from the guest's hand to a recovered disk.

mod access;
mod compare;
mod demo;
mod disks;
mod document;
mod failover;
mod files;
mod hyperv;
mod interval;
mod logs;
mod marks;
mod points;
mod refusals;
mod replicate;
mod tracked;
