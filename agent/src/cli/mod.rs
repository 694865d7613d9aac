//! The command line. What a verb does, it asks the configuration server for; offline tools and roles work here.

mod account;
mod args;
mod backup;
mod channel;
mod error;
mod events;
mod failback;
mod failover;
mod group;
mod hrl;
mod inventory;
mod job;
mod output;
mod plan;
mod point;
mod policy;
mod protect;
mod replica;
mod run;
mod status;
mod watch;

use std::future::Future;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use tidemark_transport::Role;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

use crate::client::Client;

pub use args::parse_size;
use args::{Cli, Verb};
pub use error::CliError;
pub use output::{Output, bytes as size_text};

/// Worker threads of a role's runtime; disk work has threads of its own.
const ROLE_WORKERS_MAX: usize = 8;

pub fn main() -> ExitCode {
    // Wrong usage ends here, with exit code 2.
    let cli = Cli::parse();
    start_log(&cli.verb);
    let output = Output::new(cli.json);
    match dispatch(cli, &output) {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever reads our output has enough of it.
        Err(error) if error.is_broken_pipe() => ExitCode::SUCCESS,
        Err(error) => {
            error.print();
            ExitCode::FAILURE
        }
    }
}

fn dispatch(cli: Cli, output: &Output) -> Result<(), CliError> {
    let target = cli.target;
    match cli.verb {
        Verb::Hrl(args) => hrl::run(args, output.is_json())
            .map_err(CliError::from)
            .and_then(|code| if code == ExitCode::SUCCESS { Ok(()) } else { Err(CliError::logs_not_sound()) }),
        Verb::Demo(args) => crate::demo::run(args, output),
        Verb::Up(args) => role(run::up(args)),
        Verb::Agent { verb } => match verb {
            args::AgentVerb::Run(args) => role(run::agent(args)),
            args::AgentVerb::Register(args) => client(run::register(Role::Agent, target, args, output)),
            args::AgentVerb::Guest { what, socket } => client(async {
                let thaw = matches!(what, args::GuestQuestion::Thaw);
                Ok(crate::roles::quiet::ask_guest(&socket, thaw).await?)
            }),
        },
        Verb::ProcessServer { verb } => match verb {
            args::ProcessServerVerb::Run(args) => role(run::process_server(args)),
            args::ProcessServerVerb::Register(args) => client(run::register(Role::ProcessServer, target, args, output)),
            args::ProcessServerVerb::List => client(inventory::servers(&target.client()?, None, output)),
            args::ProcessServerVerb::Show { process_server } => {
                client(inventory::servers(&target.client()?, Some(&process_server), output))
            }
            verb => client(account::registrations(&target.client()?, verb, output)),
        },
        Verb::Host { verb } => client(inventory::host(&target.client()?, verb, output)),
        Verb::Disk { verb } => client(inventory::disk(&target.client()?, verb, output)),
        Verb::ConfigServer { verb } => match verb {
            args::ConfigServerVerb::Run(args) => role(run::config_server(args)),
            args::ConfigServerVerb::Init(args) => client(run::init(args, output)),
            args::ConfigServerVerb::Backup { to, list } => client(backup::backup(&target.client()?, to, list, output)),
            args::ConfigServerVerb::Restore(args) => client(backup::restore(args, output)),
            args::ConfigServerVerb::RecoveryKey(args) => backup::recovery_key(args, output),
            args::ConfigServerVerb::RotateToken(args) => client(run::rotate_token(args, output)),
        },
        Verb::Passphrase { verb } => client(account::passphrase(&target.client()?, verb, output)),
        Verb::Identity { verb } => client(account::identity(&target.client()?, verb, output)),
        Verb::User { verb } => client(account::user(&target.client()?, verb, output)),
        Verb::Token { verb } => client(account::token(&target.client()?, verb, output)),
        Verb::Events(args) => client(events::run(&target, args, output)),
        Verb::Alert { verb } => client(events::alert(&target.client()?, verb, output)),
        Verb::Completions { shell } => {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "tidemark", &mut text);
            Ok(output.line(String::from_utf8_lossy(&text).trim_end())?)
        }
        Verb::Man { dir } => man(&dir),
        Verb::Protect(args) => client(protect::protect(&target.client()?, args, output)),
        Verb::Unprotect(args) => client(protect::unprotect(&target.client()?, args, output)),
        Verb::Pause(args) => client(protect::simple(&target.client()?, "pause", args, output)),
        Verb::Resume(args) => client(protect::simple(&target.client()?, "resume", args, output)),
        Verb::Resync(args) if args.cancel => client(protect::cancel_resync(&target.client()?, args.machine, output)),
        Verb::Resync(args) => client(protect::simple(&target.client()?, "resync", args.machine, output)),
        Verb::Status(args) => client(status::run(&target, args, output)),
        Verb::Machine { verb } => client(failover::machine(&target.client()?, verb, output)),
        Verb::Failover { verb } => client(failover::run(&target.client()?, verb, output)),
        Verb::Commit(args) => client(failover::commit(&target.client()?, args, output)),
        Verb::Reprotect(args) => client(failback::reprotect(&target.client()?, args, output)),
        Verb::Failback(args) => client(failback::failback(&target.client()?, args, output)),
        Verb::Migrate(args) => client(failover::migrate(&target.client()?, args, output)),
        Verb::Point { verb } => client(point::run(&target.client()?, verb, output)),
        Verb::Policy { verb } => client(policy::run(&target.client()?, verb, output)),
        Verb::Group { verb } => client(group::run(&target.client()?, verb, output)),
        Verb::Plan { verb } => client(plan::run(&target.client()?, verb, output)),
        Verb::Channel { verb } => client(channel::run(&target.client()?, verb, output)),
        Verb::Job { verb } => client(job::run(&target, verb, output)),
        Verb::Replica { verb } => replica::run(verb, &target, output),
    }
}

/// A page for the command and one for each of its verbs.
fn man(dir: &std::path::Path) -> Result<(), CliError> {
    let write = || -> std::io::Result<()> {
        std::fs::create_dir_all(dir)?;
        clap_mangen::generate_to(Cli::command(), dir)
    };
    write().map_err(|error| {
        CliError::new(format!("cannot write to {}: {error}", dir.display()), "name a folder that this user can write")
    })
}

/// Deletes what is at `path`, and says so.
async fn delete(client: &Client, path: &str, line: &str, output: &Output) -> Result<(), CliError> {
    done(&client.request(hyper::Method::DELETE, path, None).await?, line, output)
}

/// The answer to what is done, for a program or for people.
fn done(answer: &serde_json::Value, line: &str, output: &Output) -> Result<(), CliError> {
    if output.is_json() { Ok(output.json(answer)?) } else { Ok(output.line(line)?) }
}

/// A verb that asks a server needs one thread.
fn client<T>(work: impl Future<Output = Result<T, CliError>>) -> Result<T, CliError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(CliError::runtime)?;
    runtime.block_on(work)
}

fn role<T>(work: impl Future<Output = Result<T, CliError>>) -> Result<T, CliError> {
    let workers = std::thread::available_parallelism().map_or(2, usize::from).clamp(2, ROLE_WORKERS_MAX);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers)
        .enable_all()
        .build()
        .map_err(CliError::runtime)?;
    runtime.block_on(work)
}

/// Logs go to stderr: everything that roles note, warnings of the rest. `TIDEMARK_LOG` says otherwise by level and module
/// (`info,tidemark_host=debug`), and `TIDEMARK_LOG_FORMAT=json` makes each line one object for those who collect them.
fn start_log(verb: &Verb) {
    let is_role = matches!(
        verb,
        Verb::Up(_)
            | Verb::Agent { verb: args::AgentVerb::Run(_) }
            | Verb::ProcessServer { verb: args::ProcessServerVerb::Run(_) }
            | Verb::ConfigServer { verb: args::ConfigServerVerb::Run(_) }
    );
    let level = if is_role { LevelFilter::INFO } else { LevelFilter::WARN };
    let asked = std::env::var("TIDEMARK_LOG").ok().map(|asked| (asked.parse::<Targets>(), asked));
    let (targets, bad) = match asked {
        None => (Targets::new().with_default(level), None),
        Some((Ok(targets), _)) => (targets, None),
        Some((Err(error), asked)) => (Targets::new().with_default(level), Some((asked, error))),
    };
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let lines = match std::env::var("TIDEMARK_LOG_FORMAT").as_deref() {
        Ok("json") => lines.json().flatten_event(true).boxed(),
        _ => lines.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).boxed(),
    };
    let _ = tracing_subscriber::registry().with(lines.with_filter(targets)).try_init();
    if let Some((asked, error)) = bad {
        tracing::warn!(TIDEMARK_LOG = asked, %error, "this filter of logs cannot be read: `info,tidemark_host=debug` can");
    }
}
