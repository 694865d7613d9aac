//! What can be typed.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};
use tidemark_proto::control::ImageFormat;

use super::events::Seen;
use crate::client::{Client, ClientError};
use crate::demo::DemoArgs;

/// Takes the name of a format, and lists them in the help.
pub fn image_format() -> impl TypedValueParser<Value = ImageFormat> {
    PossibleValuesParser::new(ImageFormat::ALL.map(ImageFormat::name)).try_map(|name| name.parse())
}

const LOGS: &str =
    "Logs go to standard error. TIDEMARK_LOG says what of them, by level and module: info,tidemark_host=debug.
TIDEMARK_LOG_FORMAT=json makes each line one JSON object.";

/// Disaster recovery by replication: records every change to protected disks and recovers any point of them.
#[derive(Parser)]
#[command(name = "tidemark", version, max_term_width = 110, after_long_help = LOGS)]
pub struct Cli {
    #[command(subcommand)]
    pub verb: Verb,
    #[command(flatten)]
    pub target: Target,
    /// Print exactly one JSON document (with --watch, one a line).
    #[arg(long, global = true)]
    pub json: bool,
}

/// Where the configuration server is; without these, TIDEMARK_DIR names the folder of a `tidemark up`.
#[derive(Args, Clone, Default)]
pub struct Target {
    /// The configuration server, https://HOST:PORT.
    #[arg(long, global = true, value_name = "URL", env = "TIDEMARK_SERVER", hide_env_values = true)]
    pub server: Option<String>,
    /// The file with its bearer token.
    #[arg(long, global = true, value_name = "FILE", env = "TIDEMARK_TOKEN_FILE", hide_env_values = true)]
    pub token_file: Option<PathBuf>,
    /// The certificate of its authority.
    #[arg(long, global = true, value_name = "FILE", env = "TIDEMARK_CA_FILE", hide_env_values = true)]
    pub ca_file: Option<PathBuf>,
}

impl Target {
    pub fn client(&self) -> Result<Client, ClientError> {
        match (&self.server, &self.token_file, &self.ca_file) {
            (Some(server), Some(token_file), Some(ca_file)) => Client::new(server, token_file, ca_file),
            (None, None, None) => match std::env::var_os("TIDEMARK_DIR") {
                Some(folder) => Client::of_folder(&PathBuf::from(folder)),
                None => Err(ClientError::Unnamed),
            },
            _ => Err(ClientError::Unnamed),
        }
    }
}

#[derive(Subcommand)]
pub enum Verb {
    /// Shows and proves the main job on this machine, in under a minute.
    Demo(DemoArgs),
    /// Runs all roles on this machine in one process, with their state in one folder.
    Up(UpArgs),
    /// The agent of a protected host.
    Agent {
        #[command(subcommand)]
        verb: AgentVerb,
    },
    /// The process server, which keeps replicas.
    ProcessServer {
        #[command(subcommand)]
        verb: ProcessServerVerb,
    },
    /// Hosts whose agents registered.
    Host {
        #[command(subcommand)]
        verb: HostVerb,
    },
    /// The disks of all hosts, protected or not.
    Disk {
        #[command(subcommand)]
        verb: DiskVerb,
    },
    /// The configuration server, which knows what is wanted.
    ConfigServer {
        #[command(subcommand)]
        verb: ConfigServerVerb,
    },
    /// What lets hosts and process servers register.
    Passphrase {
        #[command(subcommand)]
        verb: PassphraseVerb,
    },
    /// Who has certificates, and who is refused all the same.
    Identity {
        #[command(subcommand)]
        verb: IdentityVerb,
    },
    /// Who may use the API.
    User {
        #[command(subcommand)]
        verb: UserVerb,
    },
    /// What shows who a request is from.
    Token {
        #[command(subcommand)]
        verb: TokenVerb,
    },
    /// Protects a machine: its disks are replicated from now on.
    Protect(ProtectArgs),
    /// Ends the protection of a machine.
    Unprotect(UnprotectArgs),
    /// Sends nothing for now; changes are kept at the host.
    Pause(MachineArgs),
    /// Sends again.
    Resume(MachineArgs),
    /// Compares every block with the replica.
    Resync(ResyncArgs),
    /// Shows how machines do.
    Status(StatusArgs),
    /// How machines are run where their replica is.
    Machine {
        #[command(subcommand)]
        verb: MachineVerb,
    },
    /// Runs machines from their recovery points.
    Failover {
        #[command(subcommand)]
        verb: FailoverVerb,
    },
    /// Accepts the point that a machine failed over to, or its failback.
    Commit(MachineArgs),
    /// Brings the home disks of a committed machine to its state while it runs, and keeps them there.
    Reprotect(ReprotectArgs),
    /// Takes a reprotected machine home.
    Failback(FailbackArgs),
    /// Completes a migration: a committed machine stays where it is, and is not protected any more.
    Migrate(MachineArgs),
    /// Recovery points.
    Point {
        #[command(subcommand)]
        verb: PointVerb,
    },
    /// How machines are protected.
    Policy {
        #[command(subcommand)]
        verb: PolicyVerb,
    },
    /// Machines that belong together.
    Group {
        #[command(subcommand)]
        verb: GroupVerb,
    },
    /// Machines that fail over together, in order, with scripts and manual steps between.
    Plan {
        #[command(subcommand)]
        verb: PlanVerb,
    },
    /// Where alerts are told: webhooks and mail.
    Channel {
        #[command(subcommand)]
        verb: ChannelVerb,
    },
    /// What was asked for, and how it went.
    Job {
        #[command(subcommand)]
        verb: JobVerb,
    },
    /// What happened.
    Events(EventsArgs),
    /// What lasts and needs someone.
    Alert {
        #[command(subcommand)]
        verb: AlertVerb,
    },
    /// Prints completions for a shell.
    Completions {
        /// Whose.
        #[arg(value_enum)]
        shell: clap_complete::Shell,
    },
    /// Writes the man pages.
    Man {
        /// Where to; made when it is missing.
        #[arg(long)]
        dir: PathBuf,
    },
    /// Replicas that machines left, and a replica's folder looked into without a server.
    Replica {
        #[command(subcommand)]
        verb: ReplicaVerb,
    },
    /// Looks into Hyper-V Replica Log files, and replays them, without a server.
    Hrl(super::hrl::HrlArgs),
}

#[derive(Args)]
pub struct UpArgs {
    /// The folder; made when it is missing.
    #[arg(long, env = "TIDEMARK_DIR")]
    pub dir: PathBuf,
    /// Where the API and the console listen; port 0 takes any free one, the one of last time where it can.
    #[arg(long, value_name = "ADDRESS")]
    pub listen: Option<SocketAddr>,
}

#[derive(Subcommand)]
pub enum AgentVerb {
    /// Runs the role until SIGTERM.
    Run(RoleArgs),
    /// Gets a certificate for this host, with a passphrase.
    Register(RegisterArgs),
    /// Asks a QEMU guest agent to freeze its file systems, or to thaw them: what app-consistent points do.
    Guest {
        /// Which of both.
        #[arg(value_enum)]
        what: GuestQuestion,
        /// The channel of the guest agent.
        socket: PathBuf,
    },
}

#[derive(Clone, Copy, ValueEnum)]
pub enum GuestQuestion {
    /// Everything is written to the disks, and nothing more until the thaw.
    Freeze,
    /// Writing goes on.
    Thaw,
}

#[derive(Subcommand)]
pub enum ProcessServerVerb {
    /// Runs the role until SIGTERM.
    Run(RoleArgs),
    /// Gets a certificate for this process server, with a passphrase and an operator's approval.
    Register(RegisterArgs),
    /// All process servers, those that wait for approval first.
    List,
    /// A process server with its volume and its machines.
    Show {
        /// Its name, or its id as `process-server list` shows it.
        #[arg(value_name = "SERVER")]
        process_server: String,
    },
    /// Takes a process server that is gone for good out of the inventory; its identity is refused from then on.
    Delete {
        /// Its name, or its id as `process-server list` shows it.
        #[arg(value_name = "SERVER")]
        process_server: String,
        /// Give up replicas that it keeps of machines that are not protected any more.
        #[arg(long)]
        force: bool,
    },
    /// Lets a process server have its certificate.
    Approve {
        /// As `process-server list` shows it.
        registration: String,
    },
    /// Refuses a registration.
    Reject {
        /// As `process-server list` shows it.
        registration: String,
    },
}

#[derive(Subcommand)]
pub enum HostVerb {
    /// All hosts.
    List,
    /// A host with its disks.
    Show {
        /// Its name, or its id as `host list` shows it.
        host: String,
    },
    /// Takes a host that is gone for good out of the inventory; its identity is refused from then on.
    Delete {
        /// Its name, or its id as `host list` shows it.
        host: String,
    },
}

#[derive(Subcommand)]
pub enum DiskVerb {
    /// Disks as their hosts see them: who uses them, and how each could be protected.
    List {
        /// Of this host only, by its name or id.
        #[arg(long)]
        host: Option<String>,
        /// Only those that are not protected.
        #[arg(long)]
        unprotected: bool,
    },
}

#[derive(Subcommand)]
pub enum ConfigServerVerb {
    /// Runs the role until SIGTERM.
    Run(RoleArgs),
    /// The first set-up: authority, token, database, a passphrase for an agent and one for a process server, and the
    /// recovery key.
    Init(RoleArgs),
    /// Backs up the configuration now, sealed for the recovery key; every process server keeps it as well.
    Backup {
        /// Write it to a file as well.
        #[arg(long, value_name = "FILE")]
        to: Option<PathBuf>,
        /// Make none: list those there are.
        #[arg(long, conflicts_with = "to")]
        list: bool,
    },
    /// Makes a new folder, on any host, that of the configuration server whose backup it is. Offline.
    Restore(RestoreArgs),
    /// Makes another recovery key and shows it, this once; backups from now on are opened by it. Offline.
    RecoveryKey(RoleArgs),
    /// Writes another token of the administrator into its file on this host; the one before is refused at once. Whether
    /// the configuration server runs does not matter.
    RotateToken(RoleArgs),
}

#[derive(Args)]
pub struct RestoreArgs {
    /// The backup: from `config-backups` of a process server, or as `config-server backup --to` wrote it.
    pub file: PathBuf,
    /// The file with the recovery key; `-`: standard input.
    #[arg(long, value_name = "FILE")]
    pub key_file: PathBuf,
    /// Look only what it is, and whether it can be opened.
    #[arg(long)]
    pub check: bool,
    #[command(flatten)]
    pub role: RoleArgs,
}

/// The server is named by --server.
#[derive(Args)]
pub struct RegisterArgs {
    /// The file with the passphrase; `-`: standard input.
    #[arg(long, value_name = "FILE")]
    pub passphrase_file: PathBuf,
    /// The fingerprint of the configuration server's authority, as `config-server init` printed it.
    #[arg(long, value_name = "FINGERPRINT")]
    pub ca_fingerprint: String,
    /// How this machine is called; its host name, where nothing is given.
    #[arg(long)]
    pub name: Option<String>,
    /// The role's own folder; else the one in the configuration of this machine.
    #[arg(long, conflicts_with = "config")]
    pub dir: Option<PathBuf>,
    /// The configuration of this machine.
    #[arg(long, default_value = "/etc/tidemark/tidemark.toml")]
    pub config: PathBuf,
    /// Do not wait for an approval: registering again asks again.
    #[arg(long)]
    pub no_wait: bool,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum RegisteringRole {
    /// Of a host that is protected.
    Agent,
    /// Of a server that keeps replicas.
    ProcessServer,
}

#[derive(Subcommand)]
pub enum PassphraseVerb {
    /// Makes a passphrase and shows it, this once.
    Create {
        /// Which role may register with it.
        #[arg(long, value_enum)]
        role: RegisteringRole,
        /// How long it can be used, such as 1h.
        #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration, default_value = "1day")]
        lifetime: Duration,
        /// How often.
        #[arg(long, default_value_t = 1)]
        uses: u32,
        /// The host or process server that was installed again: it gets its old identity, and its old certificates are
        /// refused.
        #[arg(long, value_name = "NAME or ID")]
        replaces: Option<String>,
    },
    /// Those that still can be used.
    List,
    /// Nobody registers with it any more.
    Delete {
        /// As `passphrase list` shows it.
        id: String,
    },
}

#[derive(Subcommand)]
pub enum IdentityVerb {
    /// All certificates' identities.
    List,
    /// Refuses a host or process server from now on; its open streams end.
    Revoke {
        /// As `identity list` shows it.
        identity: String,
        /// For whoever reads the events.
        #[arg(long, default_value = "")]
        reason: String,
    },
    /// Takes it again.
    Restore {
        /// As `identity list` shows it.
        identity: String,
    },
}

#[derive(Clone, Copy, ValueEnum)]
pub enum UserRoleArg {
    /// Sees everything, changes nothing.
    Reader,
    /// Protects, recovers, and changes policies.
    Operator,
    /// Everything, users and identities too.
    Administrator,
}

#[derive(Subcommand)]
pub enum UserVerb {
    /// Makes a user; tokens are made for one.
    Create {
        /// What the user is called.
        name: String,
        /// What the user may do.
        #[arg(long, value_enum)]
        role: UserRoleArg,
    },
    /// All users.
    List,
    /// Gives a user another role.
    Set {
        /// As `user list` shows it.
        name: String,
        /// What the user may do from now on.
        #[arg(long, value_enum)]
        role: UserRoleArg,
    },
    /// Deletes a user and its tokens.
    Delete {
        /// As `user list` shows it.
        name: String,
    },
}

#[derive(Subcommand)]
pub enum TokenVerb {
    /// Makes a token and shows it, this once.
    Create {
        /// Whose it is.
        #[arg(long)]
        user: String,
        /// What it is for.
        #[arg(long, default_value = "")]
        label: String,
        /// How long it can be used, such as 30days; for ever, where nothing is given.
        #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
        lifetime: Option<Duration>,
    },
    /// All tokens, never their secrets.
    List,
    /// It opens nothing any more.
    Delete {
        /// As `token list` shows it.
        id: String,
    },
}

#[derive(Args)]
pub struct EventsArgs {
    /// Go on with what happens from now.
    #[arg(long)]
    pub watch: bool,
    /// Of this machine only.
    #[arg(long)]
    pub machine: Option<String>,
    /// Of this severity and worse: info, warning or critical.
    #[arg(long)]
    pub severity: Option<String>,
    /// Only later ones than the one with this id; EPOCH.ID, where the configuration may have been restored from a backup since.
    #[arg(long, value_name = "ID")]
    pub after: Option<Seen>,
    /// At most so many.
    #[arg(long, value_name = "COUNT", default_value_t = 100)]
    pub limit: u64,
}

#[derive(Subcommand)]
pub enum AlertVerb {
    /// The worst first.
    List,
}

#[derive(Args)]
pub struct RoleArgs {
    /// Runs the role in the folder of an all-in-one, beside the others.
    #[arg(long, conflicts_with = "config")]
    pub dir: Option<PathBuf>,
    /// The configuration of this machine.
    #[arg(long, default_value = "/etc/tidemark/tidemark.toml")]
    pub config: PathBuf,
}

#[derive(Args)]
pub struct ProtectArgs {
    /// The machine's name from now on.
    pub name: String,
    /// A disk image or a block device. What a file is its name says: .qcow2, .vhdx, .vhd and .vmdk are images of that format, others plain disks.
    #[arg(long = "disk", value_name = "PATH", required = true, num_args = 1..)]
    pub disks: Vec<PathBuf>,
    /// The host that has the disks; needed where there is more than one.
    #[arg(long)]
    pub host: Option<String>,
    /// The process server that keeps the replica; needed where there is more than one. Named several times: each keeps one, with
    /// recovery points of its own.
    #[arg(long = "process-server", value_name = "SERVER")]
    pub process_servers: Vec<String>,
    /// How it is protected; without it by the default policy.
    #[arg(long)]
    pub policy: Option<String>,
    /// The group that it comes into; `none`: no group.
    #[arg(long)]
    pub group: Option<String>,
    /// Serves the disks over NBD with mutual TLS as well, at IP:PORT; port 0 takes any free one and keeps it. `none` ends it.
    #[arg(long, value_name = "ADDRESS")]
    pub listen: Option<String>,
    /// Of the disks that are named, one that is left out.
    #[arg(long, value_name = "DISK")]
    pub exclude: Vec<PathBuf>,
    /// Look only whether everything that is needed is there.
    #[arg(long)]
    pub check: bool,
    /// How changes are captured: as before, or over NBD, where this is not said.
    #[arg(long, value_enum)]
    pub via: Option<Via>,
    #[command(flatten)]
    pub wait: WaitArgs,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum Via {
    /// The workload opens its disk over NBD, at the address that is printed.
    Nbd,
    /// The workload goes on as it is: the kernel tells which blocks of its block devices change.
    Bpf,
    /// The workload opens its disk as a file, at the path that is printed.
    Fuse,
    /// Hyper-V's own logs are taken: DISK is a .vhdx or .vhd file whose .hrl files lie beside it.
    Hrl,
    /// The machine goes on as it is, under QEMU: DISK is its image, or its QMP socket and a node (/run/web.qmp/drive0).
    Qemu,
    /// The machine goes on as it is, on VMware vSphere: DISK is vsphere:CONNECTION/MACHINE/DISK (vsphere:lab/DC0/vm/web/scsi0:0).
    Vsphere,
    /// The machine goes on as it is, on the Hyper-V host that the agent runs on: DISK is its .vhdx (D:\Machines\web.vhdx).
    Rct,
}

#[derive(Args)]
pub struct WaitArgs {
    /// Print the job's id and do not wait for it.
    #[arg(long)]
    pub no_wait: bool,
}

#[derive(Args)]
pub struct MachineArgs {
    /// The machine.
    pub name: String,
    #[command(flatten)]
    pub wait: WaitArgs,
}

#[derive(Args)]
pub struct ResyncArgs {
    #[command(flatten)]
    pub machine: MachineArgs,
    /// Ends one that was asked for before; what it found so far, and all recovery points, stay.
    #[arg(long)]
    pub cancel: bool,
}

#[derive(Args)]
pub struct UnprotectArgs {
    /// The machine.
    pub name: String,
    /// Delete the replica and its recovery points as well.
    #[arg(long)]
    pub delete_replica: bool,
    /// Delete locked points and served ones too.
    #[arg(long, requires = "delete_replica")]
    pub force: bool,
    #[command(flatten)]
    pub wait: WaitArgs,
}

#[derive(Subcommand)]
pub enum MachineVerb {
    /// Shows how a machine is run.
    Show {
        /// The machine.
        name: String,
    },
    /// Says how a machine is run; what is not named stays as it is.
    Set(Box<MachineSetArgs>),
    /// The disks of a machine that is protected.
    Disk {
        #[command(subcommand)]
        verb: MachineDiskVerb,
    },
    /// The process servers that a machine is replicated to; each keeps a replica, and one that is away holds up no other.
    ProcessServer {
        #[command(subcommand)]
        verb: ProcessServerOfVerb,
    },
}

#[derive(Subcommand)]
pub enum ProcessServerOfVerb {
    /// Replicates the machine there as well, while its workload goes on.
    Add {
        /// The machine.
        name: String,
        /// Names or ids.
        #[arg(required = true, value_name = "SERVER")]
        servers: Vec<String>,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Replicates the machine there no longer; the host keeps nothing more for it.
    Remove {
        /// The machine.
        name: String,
        /// Its name or id.
        #[arg(value_name = "SERVER")]
        process_server: String,
        /// Delete the replica that it has, with its recovery points.
        #[arg(long)]
        delete_replica: bool,
        /// Delete locked points and served ones too.
        #[arg(long, requires = "delete_replica")]
        force: bool,
        #[command(flatten)]
        wait: WaitArgs,
    },
}

#[derive(Subcommand)]
pub enum MachineDiskVerb {
    /// Protects disks of its host as well; the others go on, and recovery points cover them once they were replicated.
    Add {
        /// The machine.
        name: String,
        /// Full paths at the host.
        #[arg(required = true, value_name = "PATH")]
        disks: Vec<PathBuf>,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Takes a disk out of the machine; the recovery points that it is part of stay until they age out.
    Remove {
        /// The machine.
        name: String,
        /// Its path or id.
        disk: String,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Takes over disks that grew, now instead of within seconds.
    Resize(MachineArgs),
}

#[derive(Args)]
pub struct MachineSetArgs {
    /// The machine.
    pub name: String,
    /// bios or uefi.
    #[arg(long)]
    pub firmware: Option<String>,
    /// Converts it: 1 is BIOS, and boots from IDE; 2 is UEFI, without IDE. What was converted is taken back the same way.
    #[arg(long, value_parser = ["1", "2"], conflicts_with = "firmware")]
    pub generation: Option<String>,
    /// How many it has.
    #[arg(long, value_name = "COUNT")]
    pub processors: Option<u16>,
    /// Such as 512M or 4G.
    #[arg(long, value_parser = super::parse_size, value_name = "SIZE")]
    pub memory: Option<u64>,
    /// How each disk is connected, in their order: ide, sata, scsi, virtio or nvme. Further disks take the last one's.
    #[arg(long = "bus", value_delimiter = ',', value_name = "BUS")]
    pub buses: Vec<String>,
    /// A network card on this bridge, in drills on an isolated network; `none`: no card.
    #[arg(long = "bridge", value_name = "BRIDGE")]
    pub bridges: Vec<String>,
    /// A kernel on the process server that is started instead of a disk's boot loader; `none`: the boot loader.
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<String>,
    /// With --kernel: its first file system.
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub initrd: Option<String>,
    /// With --kernel: its command line.
    #[arg(long, value_name = "TEXT", requires = "kernel", default_value = "", allow_hyphen_values = true)]
    pub kernel_command_line: String,
    /// Sign of life: this text on the serial console.
    #[arg(long, value_name = "TEXT", group = "life")]
    pub sign_console: Option<String>,
    /// Sign of life: an answer from this TCP port.
    #[arg(long, value_name = "PORT", group = "life")]
    pub sign_port: Option<u16>,
    /// Sign of life: the guest's agent.
    #[arg(long, group = "life")]
    pub sign_agent: bool,
    /// Sign of life: none; that it was started is enough.
    #[arg(long, group = "life")]
    pub no_sign: bool,
    /// How long the sign is waited for.
    #[arg(long, value_name = "SECONDS")]
    pub sign_limit: Option<u64>,
}

#[derive(Subcommand)]
pub enum FailoverVerb {
    /// Boots a point in isolation; the machine and its replication go on.
    Test {
        /// The machine.
        name: String,
        /// An id, `latest`, `latest-app`, or a time.
        #[arg(long, default_value = "latest")]
        point: String,
        /// End it as soon as it showed its sign of life.
        #[arg(long)]
        cleanup: bool,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Ends a machine's test failovers; what they wrote is gone.
    Cleanup(MachineArgs),
    /// Shuts the machine down, keeps it from its disks, sends the last changes, and runs it where its replica is. Nothing is lost.
    /// Where its host has nothing in `owner.d/NAME` that says who runs it, shut it down yourself first: what it holds in memory is
    /// not on its disks. A machine that is protected via bpf or qemu is refused without it.
    Planned {
        #[command(flatten)]
        start: StartArgs,
        /// What its guest may take to shut down. [default: 300]
        #[arg(long, value_name = "SECONDS", conflicts_with = "disks_only")]
        shutdown_limit: Option<u64>,
        /// Turn it off when it did not shut down by then; without this nothing is begun.
        #[arg(long, conflicts_with = "disks_only")]
        turn_off: bool,
    },
    /// Runs a machine from a point, where its replica is; its source is refused from then on.
    Unplanned {
        /// `lowest-rpo` (the last consistent state that arrived), an id, `latest`, `latest-app`, or a time.
        #[arg(long, default_value = "lowest-rpo")]
        point: String,
        #[command(flatten)]
        start: StartArgs,
    },
    /// How a machine that failed over does.
    Show {
        /// The machine.
        name: String,
    },
    /// Runs it from another point; what it wrote since the failover is gone.
    ChangePoint {
        /// The machine.
        name: String,
        /// An id, `latest`, `latest-app`, or a time.
        #[arg(long)]
        point: String,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Ends the machine there and lets its source go on; what it wrote since the failover is gone.
    Cancel(MachineArgs),
    /// Gives the machine plain disks while it runs.
    Promote {
        /// The machine.
        name: String,
        /// The most that is written in a second, such as 50M.
        #[arg(long, value_parser = parse_size, value_name = "SIZE")]
        throttle: Option<u64>,
        /// Stop it; what was written stays.
        #[arg(long, conflicts_with = "throttle")]
        stop: bool,
        #[command(flatten)]
        wait: WaitArgs,
    },
}

#[derive(Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct ReprotectArgs {
    #[command(subcommand)]
    pub verb: Option<ReprotectVerb>,
    /// The machine.
    #[arg(required = true)]
    pub name: Option<String>,
    /// What crosses: `delta` (what changed on either side), `compare` (what differs, by hashes), `full` (everything). Without it the
    /// one that is recommended.
    #[arg(long, value_parser = ["delta", "compare", "full"])]
    pub method: Option<String>,
    /// The host that it goes home to; without it the one that it came from. At another one new disks are made, and everything
    /// crosses.
    #[arg(long, value_name = "HOST")]
    pub to: Option<String>,
    /// A folder of that host where new disks are made; without it the one of the original disks.
    #[arg(long, value_name = "FOLDER")]
    pub store: Option<String>,
    /// The process server that it runs at.
    #[arg(long, value_name = "SERVER")]
    pub process_server: Option<String>,
    /// Say what is in the way and what is recommended, and do nothing.
    #[arg(long)]
    pub check: bool,
    #[command(flatten)]
    pub wait: WaitArgs,
}

#[derive(Subcommand)]
pub enum ReprotectVerb {
    /// Gives the home disks back what they had.
    Cancel(MachineArgs),
}

#[derive(Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct FailbackArgs {
    #[command(subcommand)]
    pub verb: Option<FailbackVerb>,
    /// The machine.
    #[arg(required = true)]
    pub name: Option<String>,
    /// Bring its home disks close while it runs, and wait for `failback complete`.
    #[arg(long, alias = "minimize-downtime")]
    pub minimise_downtime: bool,
    /// Shut it down first and bring everything, without comparing.
    #[arg(long, conflicts_with = "minimise_downtime")]
    pub full_download: bool,
    /// Where it runs is lost: go on at home with what is there. What home does not have yet is lost.
    #[arg(long, conflicts_with_all = ["minimise_downtime", "full_download"])]
    pub unplanned: bool,
    /// The host that it goes home to; without it the one that it was reprotected to.
    #[arg(long, value_name = "HOST")]
    pub to: Option<String>,
    /// What the guest may take to shut down; then it is turned off.
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    pub shutdown_limit: u64,
    #[command(flatten)]
    pub wait: WaitArgs,
}

#[derive(Subcommand)]
pub enum FailbackVerb {
    /// Shuts it down there, brings the last changes, and hands it to its home.
    Complete {
        /// The machine.
        name: String,
        /// What the guest may take to shut down; then it is turned off.
        #[arg(long, value_name = "SECONDS", default_value_t = 300)]
        shutdown_limit: u64,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// It goes on where it ran.
    Cancel(MachineArgs),
}

#[derive(Args)]
pub struct StartArgs {
    /// The machine.
    pub name: String,
    /// Of several process servers, the one that runs it; without it the one where least is lost.
    #[arg(long, value_name = "SERVER")]
    pub process_server: Option<String>,
    /// Make the disks ready only: you attach them to a machine and start it.
    #[arg(long)]
    pub disks_only: bool,
    /// Say what would be lost and what is in the way, and do nothing.
    #[arg(long)]
    pub check: bool,
    #[command(flatten)]
    pub wait: WaitArgs,
}

#[derive(Args)]
pub struct StatusArgs {
    /// The machine; all without it.
    pub name: Option<String>,
    /// Show it again every second.
    #[arg(long)]
    pub watch: bool,
}

#[derive(Subcommand)]
pub enum PointVerb {
    /// Makes a recovery point now and waits until it is durable.
    Create {
        /// The machine.
        name: String,
        /// Freezes the machine's applications by their scripts; where there are none, you vouch that they are quiet.
        #[arg(long)]
        app_consistent: bool,
        /// What it is for, shown in the list.
        #[arg(long, default_value = "")]
        label: String,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Lists recovery points.
    List {
        /// The machine.
        name: String,
    },
    /// Keeps a point whatever its age.
    Lock {
        /// The machine.
        name: String,
        /// An id, `latest`, `latest-app`, or a time.
        point: String,
    },
    /// Lets a point expire.
    Unlock {
        /// The machine.
        name: String,
        /// An id, `latest`, `latest-app`, or a time.
        point: String,
    },
    /// Serves a point's disks until stopped.
    Serve {
        /// The machine.
        name: String,
        /// An id, `latest`, `latest-app`, or a time.
        point: String,
        /// Keep writes in a scratch layer, which goes with the serve.
        #[arg(long)]
        writable: bool,
        /// Serve the disks over NBD with mutual TLS as well, at IP:PORT of the process server; port 0 takes any free one.
        #[arg(long, value_name = "ADDRESS")]
        listen: Option<String>,
        /// Of several process servers, the one that serves; without it one that has the point.
        #[arg(long, value_name = "SERVER")]
        process_server: Option<String>,
    },
    /// Writes a point as plain disk images.
    Export {
        /// The machine.
        name: String,
        /// An id, `latest`, `latest-app`, or a time.
        point: String,
        /// A new file; for machines of several disks a folder.
        #[arg(long)]
        to: PathBuf,
        /// Of the images; without it what the name's ending says, and raw where that says nothing.
        #[arg(long, value_parser = image_format())]
        format: Option<ImageFormat>,
        /// Of several process servers, the one that writes; without it one that has the point.
        #[arg(long, value_name = "SERVER")]
        process_server: Option<String>,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Checks every byte that a point needs.
    Verify {
        /// The machine.
        name: String,
        /// An id, `latest`, `latest-app`, or a time.
        #[arg(default_value = "latest")]
        point: String,
        #[command(flatten)]
        wait: WaitArgs,
    },
}

#[derive(Subcommand)]
pub enum PolicyVerb {
    /// Makes a policy; what is not named is as in the default one.
    Create(PolicyArgs),
    /// All policies.
    List,
    /// All settings of a policy.
    Show {
        /// The policy.
        name: String,
    },
    /// Changes what is named, for all of its machines, at once.
    Set(PolicyArgs),
    /// Deletes a policy that no machine has.
    Delete {
        /// The policy.
        name: String,
    },
}

#[derive(Args)]
pub struct PolicyArgs {
    /// The policy.
    pub name: String,
    /// continuous, 30s, 5m or 15m.
    #[arg(long)]
    pub frequency: Option<String>,
    /// Any position of the last so long can be recovered, such as 2h.
    #[arg(long, value_name = "DURATION", value_parser = whole_seconds)]
    pub any_time: Option<Duration>,
    /// Points older than that expire, such as 3days; `none`: at no age.
    #[arg(long, value_name = "DURATION", value_parser = limit(whole_seconds))]
    pub retention: Option<Limit<Duration>>,
    /// At most so many points; `none`: any number.
    #[arg(long, value_name = "COUNT", value_parser = limit(count))]
    pub retention_count: Option<Limit<u64>>,
    /// A kept crash-consistent point that often; 0s: none.
    #[arg(long, value_name = "DURATION", value_parser = whole_seconds)]
    pub point_interval: Option<Duration>,
    /// How many points stay as they grow older: `2h:all,1day:1h,7days:2h,rest:4h`, the default; `all` keeps all.
    #[arg(long, value_name = "STEPS")]
    pub grid: Option<String>,
    /// auto, the default, adapts to link and processors; off; or a level of zstd.
    #[arg(long, value_name = "LEVEL", allow_negative_numbers = true)]
    pub compression: Option<String>,
    /// The most that the log of one disk may occupy, such as 10G; `none`: the agent's own default, half of the disk.
    #[arg(long, value_name = "SIZE", value_parser = limit(parse_size))]
    pub log_limit: Option<Limit<u64>>,
    /// The most that is sent in a second, such as 50M; `none`: as much as there is.
    #[arg(long, value_name = "SIZE", value_parser = limit(parse_size))]
    pub throttle: Option<Limit<u64>>,
    /// Another limit for some hours, in UTC, or some addresses of process servers: `1-5 08:00-18:00 10M` (Monday is 1),
    /// `22:00-06:00 none`, `10.1.0.0/16 5M`; may be repeated, the first that fits counts. `none` alone: no window.
    #[arg(long, value_name = "WINDOW")]
    pub throttle_window: Vec<String>,
    /// A kept app-consistent point that often; 0s: none.
    #[arg(long, value_name = "DURATION", value_parser = whole_seconds)]
    pub app_interval: Option<Duration>,
    /// An alert when the RPO is over this; 0s: three cycles, at least a minute.
    #[arg(long, value_name = "DURATION", value_parser = whole_seconds)]
    pub alarm_rpo: Option<Duration>,
    /// An alert when a log takes so much of its limit.
    #[arg(long, value_name = "PERCENT")]
    pub alarm_log: Option<u8>,
    /// An alert when more of the last hour's cycles were missed.
    #[arg(long, value_name = "PERCENT")]
    pub alarm_missed: Option<u8>,
    /// An alert when nothing was heard of a host or process server for so long.
    #[arg(long, value_name = "DURATION", value_parser = whole_seconds)]
    pub alarm_no_contact: Option<Duration>,
    /// at-rest: only process servers whose volume is encrypted take the machine. Networks are always encrypted.
    #[arg(long, value_enum)]
    pub encryption: Option<EncryptionArg>,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum EncryptionArg {
    /// Networks are always encrypted.
    Transit,
    /// The process server's volume must be encrypted too.
    AtRest,
}

impl EncryptionArg {
    pub fn name(self) -> &'static str {
        match self {
            EncryptionArg::Transit => "transit",
            EncryptionArg::AtRest => "at_rest",
        }
    }
}

#[derive(Args)]
pub struct GroupSettings {
    /// A point of all machines at one instant that often; 0s: only when one is asked for. 60s where nothing is said.
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    pub interval: Option<Duration>,
    /// The longest that a write may wait for it; 250ms where nothing is said.
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    pub hold_limit: Option<Duration>,
}

#[derive(Subcommand)]
pub enum GroupVerb {
    /// Makes a group.
    Create {
        /// What the group is called.
        name: String,
        /// Machines that are protected already.
        machines: Vec<String>,
        #[command(flatten)]
        settings: GroupSettings,
    },
    /// Changes settings of a group.
    Set {
        /// The group.
        name: String,
        #[command(flatten)]
        settings: GroupSettings,
    },
    /// Puts machines into a group.
    Add {
        /// The group.
        name: String,
        /// Machines that are protected.
        #[arg(required = true)]
        machines: Vec<String>,
    },
    /// Takes machines out of a group; they stay protected.
    Remove {
        /// The group.
        name: String,
        /// Machines of the group.
        #[arg(required = true)]
        machines: Vec<String>,
    },
    /// Makes a point of all machines at one instant now, and waits until it is durable on each.
    Point {
        /// The group.
        name: String,
        /// A text to know it by.
        #[arg(long, default_value = "")]
        label: String,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// The points that all machines of a group have, at one instant.
    Points {
        /// The group.
        name: String,
    },
    /// All groups.
    List,
    /// A group with its machines.
    Show {
        /// The group.
        name: String,
    },
    /// Deletes a group; its machines stay protected.
    Delete {
        /// The group.
        name: String,
    },
}

/// What a plan does.
#[derive(Args)]
pub struct PlanSteps {
    /// A step, in the order of the plan: `machines:NAME,NAME` and `group:NAME` fail over side by side, `script:NAME` runs a script that is
    /// installed beside the configuration server, `manual:TEXT` waits for somebody. `@10m` at its end: it fails when it takes longer.
    #[arg(long = "step", value_name = "STEP", conflicts_with = "file")]
    pub steps: Vec<String>,
    /// The steps as JSON: `{"steps":[{"action":{"machines":["db"]},"timeout_seconds":600}]}`; `-`: standard input.
    #[arg(long, value_name = "FILE", required_unless_present = "steps")]
    pub file: Option<PathBuf>,
    /// How long a step may take that does not say so.
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration, default_value = "30m")]
    pub timeout: Duration,
}

#[derive(Subcommand)]
pub enum PlanVerb {
    /// Makes a plan.
    Create {
        /// What the plan is called.
        name: String,
        #[command(flatten)]
        steps: PlanSteps,
    },
    /// Gives a plan other steps.
    Set {
        /// The plan.
        name: String,
        #[command(flatten)]
        steps: PlanSteps,
    },
    /// All plans.
    List,
    /// A plan, and how its last run does.
    Show {
        /// The plan.
        name: String,
    },
    /// Fails over: every step in order, the machines of a step side by side.
    Run {
        /// The plan.
        name: String,
        /// From points, where the sources are gone; else they are stopped, and nothing is lost.
        #[arg(long)]
        unplanned: bool,
        /// With --unplanned: `lowest-rpo` (the default), `latest`, `latest-app`, `latest-group` (one instant of all machines of a group), or a time.
        #[arg(long, requires = "unplanned")]
        point: Option<String>,
        /// Make the disks ready, and start nothing.
        #[arg(long)]
        disks_only: bool,
        /// Say what would be done and lost, and what is in the way, and do nothing.
        #[arg(long)]
        dry_run: bool,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Tests the failover of every machine in isolation, and cleans up; scripts run, manual steps are left out.
    Test {
        /// The plan.
        name: String,
        /// `latest`, `latest-app`, `latest-group`, or a time.
        #[arg(long, default_value = "latest")]
        point: String,
        /// Test the disks alone.
        #[arg(long)]
        disks_only: bool,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Says that the manual step that a run waits for is done.
    Confirm {
        /// The plan.
        name: String,
    },
    /// Goes on with a run that stopped in the middle, at the step that failed.
    Continue {
        /// The plan.
        name: String,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Takes a run back: no further step begins, and the machines go on at their sources.
    Cancel {
        /// The plan.
        name: String,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Accepts the points that all machines failed over to.
    Commit {
        /// The plan.
        name: String,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// How the last run went: the RTO of each machine, the time of each step.
    Report {
        /// The plan.
        name: String,
    },
    /// Deletes a plan; its machines stay as they are.
    Delete {
        /// The plan.
        name: String,
    },
}

#[derive(Subcommand)]
pub enum ChannelVerb {
    /// Tells alerts to a webhook or by mail from now on.
    Create(Box<ChannelArgs>),
    /// All channels.
    List,
    /// A channel, and what it could not tell.
    Show {
        /// The channel.
        name: String,
    },
    /// Tells it something now.
    Test {
        /// The channel.
        name: String,
    },
    /// Deletes a channel.
    Delete {
        /// The channel.
        name: String,
    },
}

#[derive(Args)]
pub struct ChannelArgs {
    /// What the channel is called.
    pub name: String,
    /// Of this severity and worse: warning or critical.
    #[arg(long)]
    pub severity: Option<String>,
    /// Where events are posted as JSON: https://…
    #[arg(long, value_name = "URL", required_unless_present = "smtp", conflicts_with = "smtp")]
    pub webhook: Option<String>,
    /// The file with the secret that signs what is posted.
    #[arg(long, value_name = "FILE", requires = "webhook")]
    pub secret_file: Option<PathBuf>,
    /// The mail server, HOST:PORT.
    #[arg(long, value_name = "ADDRESS", requires = "mail_from", requires = "mail_to")]
    pub smtp: Option<String>,
    /// How the mail server is reached.
    #[arg(long, value_enum, default_value = "starttls")]
    pub smtp_tls: MailTlsArg,
    /// Who logs in at the mail server.
    #[arg(long, value_name = "USER", requires = "smtp_password_file")]
    pub smtp_user: Option<String>,
    /// The file with its password.
    #[arg(long, value_name = "FILE", requires = "smtp_user")]
    pub smtp_password_file: Option<PathBuf>,
    /// The sender's address.
    #[arg(long, value_name = "MAILBOX")]
    pub mail_from: Option<String>,
    /// A recipient's address; may be repeated.
    #[arg(long, value_name = "MAILBOX", num_args = 1.., value_delimiter = ',')]
    pub mail_to: Vec<String>,
    /// PEM of the authority that vouches for the other end; without it, those of the system.
    #[arg(long, value_name = "FILE")]
    pub channel_ca: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum MailTlsArg {
    /// STARTTLS, required.
    Starttls,
    /// TLS from the first byte.
    Tls,
    /// To this machine only.
    None,
}

#[derive(Subcommand)]
pub enum JobVerb {
    /// The newest first.
    List {
        /// Of this machine only.
        #[arg(long, value_name = "NAME")]
        machine: Option<String>,
        /// In this state only.
        #[arg(long, value_parser = ["running", "succeeded", "failed", "cancelled"])]
        state: Option<String>,
        /// The newest so many.
        #[arg(long, value_name = "NUMBER")]
        limit: Option<usize>,
    },
    /// A job with its steps and outcome.
    Show {
        /// As `job list` shows it.
        id: String,
    },
    /// Waits for a job's end.
    Watch {
        /// As `job list` shows it.
        id: String,
    },
    /// Ends a job that waits or reads.
    Cancel {
        /// As `job list` shows it.
        id: String,
    },
}

#[derive(Subcommand)]
pub enum ReplicaVerb {
    /// Lists the replicas of machines that are not protected any more. The point verbs take their names and ids.
    List,
    /// Deletes such a replica with its recovery points.
    Delete {
        /// As `replica list` shows it.
        id: String,
        /// Locked points and served ones too; where the process server is gone for good, only the record of it.
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Says what a replica's folder holds.
    Inspect {
        /// The folder of a process server, or of one disk's replica in it.
        dir: PathBuf,
    },
    /// Checks a replica's folder; exit 0 if it is sound.
    Verify {
        /// The folder of a process server, or of one disk's replica in it.
        dir: PathBuf,
    },
    /// Takes a machine over where no configuration server is left, with the recovery key: its old host is refused from
    /// then on. The process server must not run.
    Failover(FailoverArgs),
}

#[derive(Args)]
pub struct FailoverArgs {
    /// The process server's folder, or that of one disk's replica in it.
    pub dir: PathBuf,
    /// The file with the recovery key; `-`: standard input.
    #[arg(long, value_name = "FILE")]
    pub key_file: PathBuf,
    /// The machine, by name or id; needed where there is more than one.
    #[arg(long)]
    pub machine: Option<String>,
    /// `lowest-rpo` (the last consistent state that arrived), an id, `latest`, `latest-app`, or a time.
    #[arg(long, default_value = "lowest-rpo")]
    pub point: String,
    /// Go on without a disk of the machine: one whose replica cannot be opened is refused otherwise.
    #[arg(long = "without-disk", value_name = "ID")]
    pub without: Vec<tidemark_base::DiskId>,
    /// Write the point's disks as raw images: a new file, or for several disks a folder.
    #[arg(long, value_name = "FILE or DIR")]
    pub to: Option<PathBuf>,
    /// Serve the point's disks, read-only, over NBD on this Unix socket until stopped.
    #[arg(long, value_name = "SOCKET", conflicts_with = "to")]
    pub serve: Option<PathBuf>,
    /// Give back what the failover holds: its point ages as others do. The old host stays refused until a configuration server
    /// lets it write again.
    #[arg(long, conflicts_with_all = ["to", "serve", "without", "point"])]
    pub release: bool,
}

/// A limit of a policy, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit<T>(pub Option<T>);

/// `none`, or what a limit is written as.
fn limit<T, E: ToString>(
    parse: impl Fn(&str) -> Result<T, E> + Clone + Send + Sync + 'static,
) -> impl Fn(&str) -> Result<Limit<T>, String> + Clone + Send + Sync + 'static {
    move |text| match text {
        "none" => Ok(Limit(None)),
        text => {
            parse(text).map(|value| Limit(Some(value))).map_err(|error| format!("{}, or `none`", error.to_string()))
        }
    }
}

fn count(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| format!("{text:?} is no count"))
}

/// A duration of whole seconds: less than one would count as none.
fn whole_seconds(text: &str) -> Result<Duration, String> {
    let duration = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    match duration.subsec_nanos() {
        0 => Ok(duration),
        _ => Err(format!("{text:?} is not a number of whole seconds")),
    }
}

/// A size in bytes: `512M`, `10G`, `4096`, in powers of 1024.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is no size: give bytes, or a number with K, M, G or T");
    let trimmed = text.trim().trim_end_matches(['B', 'b']).trim_end_matches('i');
    let digits = trimmed.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let shift = match &trimmed[digits.len()..] {
        "" => 0,
        "K" | "k" => 10,
        "M" | "m" => 20,
        "G" | "g" => 30,
        "T" | "t" => 40,
        _ => return Err(wrong()),
    };
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    number.checked_mul(1 << shift).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn limits_are_lifted_by_name_and_parts_of_seconds_are_refused() {
        let seconds = limit(whole_seconds);
        assert_eq!(seconds("none"), Ok(Limit(None)));
        assert_eq!(seconds("2h"), Ok(Limit(Some(Duration::from_secs(7200)))));
        for wrong in ["500ms", "", "x", "None", "-1s"] {
            assert!(seconds(wrong).unwrap_err().contains("`none`"), "{wrong}");
        }
        assert_eq!(limit(parse_size)("5M"), Ok(Limit(Some(5 << 20))));
        assert!(limit(count)("-1").is_err());
    }

    /// Whoever types --help is there because something else failed.
    #[test]
    fn everything_that_can_be_typed_says_what_it_is() {
        fn look(command: &clap::Command, at: &str, silent: &mut Vec<String>) {
            for argument in command.get_arguments().filter(|argument| argument.get_help().is_none()) {
                silent.push(format!("{at} {}", argument.get_id()));
            }
            for verb in command.get_subcommands() {
                let at = format!("{at} {}", verb.get_name());
                if verb.get_about().is_none() {
                    silent.push(at.clone());
                }
                look(verb, &at, silent);
            }
        }
        let mut silent = Vec::new();
        look(&Cli::command(), "tidemark", &mut silent);
        assert!(silent.is_empty(), "no help: {silent:#?}");
    }

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes_are_powers_of_1024() {
        for (text, bytes) in [("512M", 512 << 20), ("4096", 4096), ("1GiB", 1 << 30), ("2k", 2048), ("3TB", 3 << 40)] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "M", "1X", "-1", "1.5G", "99999999999T"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn disks_follow_their_flag_one_or_many() {
        for words in [&["protect", "web", "--disk", "a", "b"][..], &["protect", "web", "--disk", "a", "--disk", "b"]] {
            let cli = Cli::try_parse_from([&["tidemark"], words].concat()).unwrap();
            let Verb::Protect(args) = cli.verb else { panic!("not protect") };
            assert_eq!((args.name.as_str(), args.disks.len()), ("web", 2));
        }
        assert!(Cli::try_parse_from(["tidemark", "protect", "web"]).is_err());
    }
}
