//! Which accelerator really boots a guest: found by trying, with a limit.
//!
//! `/dev/kvm` opens on machines where no stock guest gets through it: nested hosts that emulate privileged code instruction
//! by instruction. So a guest is booted that does what kernels do early: long mode, an interrupt of its own, a locked 16-byte
//! exchange, saving and restoring vector state, and enough plain work to tell a processor from an emulation of one. It ends
//! QEMU with a code of its own. If that does not come in time, machines run under TCG, which always works.
//!
//! The finding is kept until the host boots again or QEMU is replaced.

use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tidemark_base::storage::{OpenMode, Storage, read_file, replace_file};
use tokio::process::Command;

use crate::error::{HypervisorError, store};
use crate::run::run;

/// A guest with a real processor takes a tenth of it.
const LIMIT: Duration = Duration::from_secs(4);
/// What `isa-debug-exit` makes of the guest's 0x2a.
const SUCCESS: i32 = (0x2a << 1) | 1;
const FILE: &str = "accelerator.json";
const PROBE: &str = "probe.img";
/// Disks of less than a cylinder are not booted. It is a hole.
const PROBE_BYTES: u64 = 8 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Accelerator {
    Kvm,
    Tcg,
}

impl Accelerator {
    pub fn name(self) -> &'static str {
        match self {
            Accelerator::Kvm => "kvm",
            Accelerator::Tcg => "tcg",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    pub accelerator: Accelerator,
    /// Why it is not KVM.
    pub why: Option<String>,
    /// What it holds for.
    boot: String,
    program: String,
}

/// What was found for this boot and this program, or is found now.
pub async fn find(storage: &dyn Storage, program: &Path) -> Result<Finding, HypervisorError> {
    let (boot, program_text) = (boot_id(), describe(program));
    if let Ok(content) = read_file(storage, FILE, 64 << 10)
        && let Ok(known) = serde_json::from_slice::<Finding>(&content)
        && !known.boot.is_empty()
        && (&known.boot, &known.program) == (&boot, &program_text)
    {
        return Ok(known);
    }
    let why = match Path::new("/dev/kvm").exists() {
        false => Some("this host has no /dev/kvm".to_owned()),
        true => boots(storage, program, Accelerator::Kvm).await?.err(),
    };
    let accelerator = if why.is_none() { Accelerator::Kvm } else { Accelerator::Tcg };
    let finding = Finding { accelerator, why, boot, program: program_text };
    let content = serde_json::to_vec(&finding).expect("plain data");
    replace_file(storage, FILE, &content).map_err(store("the finding about KVM cannot be kept"))?;
    tracing::info!(accelerator = finding.accelerator.name(), why = finding.why, "machines run under");
    Ok(finding)
}

/// Whether the probe gets through; why not.
async fn boots(
    storage: &dyn Storage,
    program: &Path,
    accelerator: Accelerator,
) -> Result<Result<(), String>, HypervisorError> {
    let image = storage.open(PROBE, OpenMode::OpenOrCreate).map_err(store("the probe cannot be written"))?;
    image.write_at(0, guest()).map_err(store("the probe cannot be written"))?;
    image.set_bytes(PROBE_BYTES).map_err(store("the probe cannot be written"))?;
    let mut command = Command::new(program);
    command.args(["-machine", "pc", "-accel", accelerator.name(), "-m", "32M", "-nodefaults", "-display", "none"]);
    command.args(["-cpu", if accelerator == Accelerator::Kvm { "host" } else { "max" }]);
    command.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=0x04", "-no-reboot"]);
    let drive = serde_json::json!({ "driver": "raw", "node-name": "probe", "read-only": true,
        "file": { "driver": "file", "filename": storage.path(PROBE), "locking": "off" } });
    command.arg("-blockdev").arg(drive.to_string());
    // Read-only disks of a guest are CD-ROMs or virtio; SeaBIOS boots both.
    command.args(["-device", "virtio-blk-pci,drive=probe,bootindex=0"]);
    Ok(match run(command, &[], LIMIT).await {
        Ok(output) if output.code == SUCCESS => Ok(()),
        Ok(output) => Err(format!("{} does not boot a guest: {}", accelerator.name(), output.reason())),
        Err(HypervisorError::TimedOut { limit, .. }) => {
            Err(format!("{} does not boot a guest within {limit:?}", accelerator.name()))
        }
        Err(error) => return Err(error),
    })
}

fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// The program as a file: another version is another file.
fn describe(program: &Path) -> String {
    use std::os::unix::fs::MetadataExt;
    let found = crate::qemu::find_program(program);
    match found.as_deref().and_then(|path| std::fs::metadata(path).ok().map(|metadata| (path, metadata))) {
        Some((path, metadata)) => format!("{} {} {}", path.display(), metadata.size(), metadata.mtime()),
        None => program.display().to_string(),
    }
}

/// A boot sector.
#[cfg(target_arch = "x86_64")]
fn guest() -> &'static [u8] {
    unsafe extern "C" {
        static tidemark_probe_guest: [u8; 512];
    }
    // SAFETY: the assembly below defines these 512 bytes, read-only, for the life of the program.
    unsafe { &tidemark_probe_guest }
}

/// Guests of another processor are emulated anyway.
#[cfg(not(target_arch = "x86_64"))]
fn guest() -> &'static [u8] {
    &[0; 512]
}

// Loaded at 0x7c00 in real mode. Addresses are numbers, fixed by `.org`, because it is not linked where it runs.
#[cfg(target_arch = "x86_64")]
std::arch::global_asm!(
    r#"
.pushsection .rodata.tidemark_probe_guest,"a",@progbits
.balign 16
.globl tidemark_probe_guest
tidemark_probe_guest:
.code16
    cli
    cld
    xorw %ax, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movw $0x7c00, %sp
    // Page tables: 2 MiB at address 0, in three pages from 0x1000.
    movl $0x1000, %edi
    movl %edi, %cr3
    xorl %eax, %eax
    movl $0xc00, %ecx
    rep stosl
    movl $0x2003, 0x1000
    movl $0x3003, 0x2000
    movl $0x83, 0x3000
    // Physical addresses of 8 bytes, and vector instructions.
    movl %cr4, %eax
    orl $0x620, %eax
    movl %eax, %cr4
    // Long mode.
    movl $0xc0000080, %ecx
    rdmsr
    orl $0x100, %eax
    wrmsr
    lgdtl 0x7df0
    movl %cr0, %eax
    andl $0xfffffffb, %eax
    orl $0x80000003, %eax
    movl %eax, %cr0
    ljmpl $8, $0x7c80
.org tidemark_probe_guest + 0x80
.code64
    movw $16, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movl $0x7000, %esp
    // An interrupt table with one entry: the breakpoint.
    movl $0x5030, %edi
    movl $0x00087d60, (%rdi)
    movl $0x00008e00, 4(%rdi)
    movl $0, 8(%rdi)
    movl $0, 12(%rdi)
    lidt 0x7de0
    xorl %ebp, %ebp
    int3
    cmpl $1, %ebp
    jne 3f
    // A locked exchange of 16 bytes.
    movl $0x6000, %edi
    xorl %eax, %eax
    xorl %edx, %edx
    movq %rax, (%rdi)
    movq %rax, 8(%rdi)
    movl $1, %ebx
    movl $2, %ecx
    lock cmpxchg16b (%rdi)
    jne 3f
    // Vector state, where the processor saves it.
    movl $1, %eax
    xorl %ecx, %ecx
    cpuid
    btl $26, %ecx
    jnc 1f
    movq %cr4, %rax
    orl $0x40000, %eax
    movq %rax, %cr4
    xorl %ecx, %ecx
    xorl %edx, %edx
    movl $3, %eax
    xsetbv
    // The header of what is restored must be zero.
    movl $0x6400, %edi
    xorl %eax, %eax
    movl $0x200, %ecx
    rep stosb
    movl $0x6200, %edi
    movl $3, %eax
    xorl %edx, %edx
    xsave (%rdi)
    movl $3, %eax
    xorl %edx, %edx
    xrstor (%rdi)
1:
    // Plain work: a twentieth of a second for a processor.
    movl $0x8000000, %ecx
2:
    decl %ecx
    jnz 2b
    movb $0x2a, %al
    outb %al, $0xf4
3:
    hlt
    jmp 3b
.org tidemark_probe_guest + 0x160
    incl %ebp
    iretq
.org tidemark_probe_guest + 0x1c0
    // Code, then data.
    .quad 0
    .quad 0x00af9a000000ffff
    .quad 0x00cf92000000ffff
.org tidemark_probe_guest + 0x1e0
    .word 0x3f
    .quad 0x5000
.org tidemark_probe_guest + 0x1f0
    .word 0x17
    .long 0x7dc0
.org tidemark_probe_guest + 0x1fe
    .word 0xaa55
.popsection
"#,
    options(att_syntax)
);

#[cfg(test)]
mod tests {
    use super::*;
    use tidemark_base::storage::RealStorage;

    #[tokio::test]
    async fn the_probe_boots_where_a_guest_boots_and_the_finding_is_kept() {
        let program = Path::new("qemu-system-x86_64");
        if crate::qemu::find_program(program).is_none() {
            return crate::qemu::tests::skipped("the_probe_boots_where_a_guest_boots_and_the_finding_is_kept");
        }
        let folder = tempfile::tempdir().unwrap();
        let storage = RealStorage::open_folder(folder.path());
        // TCG boots everything, so that a failure is the probe's own.
        assert_eq!(boots(&*storage, program, Accelerator::Tcg).await.unwrap(), Ok(()));
        let finding = find(&*storage, program).await.unwrap();
        assert_eq!(finding.why.is_none(), finding.accelerator == Accelerator::Kvm, "{finding:?}");
        // A finding of another boot does not count; one of this boot does.
        let other = Finding { why: Some("kept".into()), accelerator: Accelerator::Tcg, ..finding.clone() };
        replace_file(&*storage, FILE, &serde_json::to_vec(&other).unwrap()).unwrap();
        assert_eq!(find(&*storage, program).await.unwrap(), other);
        let stale = Finding { boot: "another".into(), ..other };
        replace_file(&*storage, FILE, &serde_json::to_vec(&stale).unwrap()).unwrap();
        assert_ne!(find(&*storage, program).await.unwrap().boot, "another");
    }

    #[tokio::test]
    async fn a_guest_that_does_not_end_is_no_accelerator() {
        let program = Path::new("qemu-system-x86_64");
        if crate::qemu::find_program(program).is_none() {
            return crate::qemu::tests::skipped("a_guest_that_does_not_end_is_no_accelerator");
        }
        let folder = tempfile::tempdir().unwrap();
        let storage = RealStorage::open_folder(folder.path());
        // A QEMU whose guest jumps to itself.
        let wrapper = folder.path().join("qemu");
        let script = format!(
            "#!/bin/sh\nprintf '\\353\\376' | dd of={}/{PROBE} bs=1 seek=0 conv=notrunc 2>/dev/null\nexec {} \"$@\"\n",
            folder.path().display(),
            program.display()
        );
        use std::io::Write;
        use std::os::unix::fs::PermissionsExt;
        std::fs::File::create(&wrapper).unwrap().write_all(script.as_bytes()).unwrap();
        std::fs::set_permissions(&wrapper, std::fs::Permissions::from_mode(0o755)).unwrap();
        let outcome = boots(&*storage, &wrapper, Accelerator::Tcg).await.unwrap();
        assert!(outcome.unwrap_err().contains("within"));
    }
}
