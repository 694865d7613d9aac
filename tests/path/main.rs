//! The path of a write, from the guest's hand to a recovered disk.

mod access;
mod applications;
mod compare;
mod consumers;
mod demo;
mod devices;
mod disks;
mod document;
mod elsewhere;
mod failover;
mod files;
mod groups;
mod hyperv;
mod images;
mod interval;
mod logs;
mod marks;
mod plans;
mod points;
mod refusals;
mod replicate;
mod reprotect;
mod restored;
mod taken;
mod tracked;
mod vsphere;
