//! The `tidemark` command of a Windows host: the agent, as a program and as a service. Machines are protected and recovered with the
//! command on Linux, or by the REST API.

mod log;
mod service;

use std::ffi::OsString;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use tidemark_transport::Role;
use tokio::signal::windows;

use crate::roles::place::{Config, Place};
use crate::roles::register::{self, Outcome, Registration};
use crate::roles::{RoleError, agent, plain_host_name};

/// Worker threads of the agent's runtime; disk work has threads of its own.
const WORKERS_MAX: usize = 8;

/// Disaster recovery by replication: the agent of a Hyper-V host.
#[derive(Parser)]
#[command(name = "tidemark", version, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// The agent of a protected host.
    Agent {
        #[command(subcommand)]
        verb: AgentVerb,
    },
}

#[derive(Subcommand)]
enum AgentVerb {
    /// Runs the agent until Ctrl-C.
    Run(ConfigArgs),
    /// Gets a certificate for this host, with a passphrase.
    Register(RegisterArgs),
    /// The agent as a service of Windows.
    Service {
        #[command(subcommand)]
        verb: ServiceVerb,
    },
}

#[derive(Subcommand)]
enum ServiceVerb {
    /// Installs and starts the service: it runs from now on, and with each start of the system.
    Install(ConfigArgs),
    /// Stops the service and removes it. What it keeps stays.
    Remove,
    /// What Windows runs.
    #[command(hide = true)]
    Run(ConfigArgs),
}

#[derive(Args)]
struct ConfigArgs {
    /// The configuration of this machine.
    #[arg(long, default_value_os_t = configuration())]
    config: PathBuf,
}

#[derive(Args)]
struct RegisterArgs {
    /// The configuration server, https://HOST:PORT.
    #[arg(long, value_name = "URL", env = "TIDEMARK_SERVER", hide_env_values = true)]
    server: String,
    /// The file with the passphrase; `-`: standard input.
    #[arg(long, value_name = "FILE")]
    passphrase_file: PathBuf,
    /// The fingerprint of the configuration server's authority, as `config-server init` printed it.
    #[arg(long, value_name = "FINGERPRINT")]
    ca_fingerprint: String,
    /// How this machine is called; its computer name, where nothing is given.
    #[arg(long)]
    name: Option<String>,
    /// The configuration of this machine.
    #[arg(long, default_value_os_t = configuration())]
    config: PathBuf,
}

/// Where programs keep what belongs to the machine.
fn data_folder() -> PathBuf {
    let folder = std::env::var_os("ProgramData").unwrap_or_else(|| OsString::from(r"C:\ProgramData"));
    Path::new(&folder).join("Tidemark")
}

fn configuration() -> PathBuf {
    data_folder().join("tidemark.toml")
}

pub fn main() -> ExitCode {
    // Wrong usage ends here, with exit code 2.
    let Verb::Agent { verb } = Cli::parse().verb;
    let done = match verb {
        AgentVerb::Run(args) => {
            log::to_console();
            run(&args.config, ended)
        }
        AgentVerb::Register(args) => register(args),
        AgentVerb::Service { verb: ServiceVerb::Install(args) } => service::install(&args.config),
        AgentVerb::Service { verb: ServiceVerb::Remove } => service::remove(),
        AgentVerb::Service { verb: ServiceVerb::Run(args) } => {
            log::to_file(&data_folder().join("log"));
            service::run(args.config)
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(help = error.help, "{}", error.message);
            eprintln!("error: {}", error.message);
            if !error.help.is_empty() {
                eprintln!("help: {}", error.help);
            }
            ExitCode::FAILURE
        }
    }
}

/// Runs the agent until what `until` makes is ready.
fn run<F: Future<Output = ()>>(config: &Path, until: impl FnOnce() -> std::io::Result<F>) -> Result<(), RoleError> {
    let cannot = |error: std::io::Error| RoleError::new(&error, "see the system's message");
    let workers = std::thread::available_parallelism().map_or(2, usize::from).clamp(2, WORKERS_MAX);
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.worker_threads(workers).enable_all().build().map_err(cannot)?;
    runtime.block_on(async {
        let until = until().map_err(cannot)?;
        let running = agent::start(Place::configured(settings(config)?, Role::Agent)?).await?;
        until.await;
        tracing::info!("stopping");
        running.stop().await;
        Ok(())
    })
}

fn settings(config: &Path) -> Result<crate::roles::place::RoleConfig, RoleError> {
    Config::read(config)?.of(Role::Agent).ok_or_else(|| RoleError {
        message: format!("{} has no section [agent]", config.display()),
        help: "write it as packaging/windows/tidemark.toml shows".to_owned(),
    })
}

/// Ctrl-C, Ctrl-Break, the end of the console or of the system.
fn ended() -> std::io::Result<impl Future<Output = ()>> {
    let (mut interrupt, mut r#break) = (windows::ctrl_c()?, windows::ctrl_break()?);
    let (mut close, mut shutdown) = (windows::ctrl_close()?, windows::ctrl_shutdown()?);
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = r#break.recv() => {}
            _ = close.recv() => {}
            _ = shutdown.recv() => {}
        }
    })
}

fn register(args: RegisterArgs) -> Result<(), RoleError> {
    let unreadable = |error: std::io::Error| RoleError {
        message: format!("cannot read the passphrase from {}: {error}", args.passphrase_file.display()),
        help: "name the file that holds it, or `-` for standard input".to_owned(),
    };
    let passphrase = match args.passphrase_file.as_os_str() == "-" {
        true => std::io::read_to_string(std::io::stdin()).map_err(unreadable)?,
        false => std::fs::read_to_string(&args.passphrase_file).map_err(unreadable)?,
    };
    let registration = Registration {
        role: Role::Agent,
        server: args.server,
        passphrase,
        fingerprint: args.ca_fingerprint,
        name: args.name.unwrap_or_else(plain_host_name),
        dir: settings(&args.config)?.dir,
        wait: true,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| RoleError::new(&error, "see the system's message"))?;
    let tell = |text: &str| eprintln!("… {text}");
    match runtime.block_on(register::register(registration, tell))? {
        Outcome::Registered { identity, control } => {
            println!("registered as {identity}; the configuration server is at {control}");
        }
        Outcome::Waiting { registration } => println!("waiting for approval: {registration}"),
    }
    if std::io::stdout().is_terminal() {
        println!("`tidemark agent service install` runs it from now on");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_configuration_that_is_installed_is_sound() {
        let config: Config = toml::from_str(include_str!("../../../packaging/windows/tidemark.toml")).unwrap();
        let agent = config.agent.unwrap();
        assert!(agent.config_server.is_none() && agent.dir.starts_with(r"C:\ProgramData\Tidemark"), "{:?}", agent.dir);
    }

    #[test]
    fn every_verb_and_flag_has_help() {
        fn look(command: &clap::Command) {
            assert!(command.get_about().is_some(), "{}", command.get_name());
            for argument in command.get_arguments() {
                assert!(argument.get_help().is_some(), "{} {}", command.get_name(), argument.get_id());
            }
            command.get_subcommands().for_each(look);
        }
        Cli::command().debug_assert();
        look(&Cli::command());
    }

    #[test]
    fn without_a_configuration_it_says_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        let config = folder.path().join("tidemark.toml");
        let run = || run(&config, ended).unwrap_err();
        assert!(run().message.contains("tidemark.toml"), "{}", run().message);
        std::fs::write(&config, "[process-server]\ndir = 'C:\\x'\n").unwrap();
        assert!(run().message.contains("[agent]"), "{}", run().message);
        let dir = folder.path().join("agent");
        std::fs::write(&config, format!("[agent]\ndir = '{}'\n", dir.display())).unwrap();
        assert!(run().message.contains("not registered"), "{}", run().message);
    }
}
