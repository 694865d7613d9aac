//! Verbs that run a role, until SIGTERM or SIGINT.

use serde_json::json;
use tidemark_transport::Role;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::CliError;
use super::args::{RegisterArgs, RoleArgs, Target, UpArgs};
use super::output::Output;
use crate::client::Client;
use crate::folder::{Folder, FolderError};
use crate::roles::notify::Manager;
use crate::roles::place::{Config, Place, RoleConfig};
use crate::roles::register::{self, Outcome, Registration};
use crate::roles::up::Up;
use crate::roles::{RoleError, agent, config_server, plain_host_name, process_server};

struct Ends {
    terminate: Signal,
    interrupt: Signal,
}

impl Ends {
    fn new() -> std::io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn wait(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Returns when the process is told to end.
pub fn ended() -> std::io::Result<impl std::future::Future<Output = ()>> {
    let mut ends = Ends::new()?;
    Ok(async move { ends.wait().await })
}

/// Tells the service manager, and waits for the end.
async fn serve_until(ends: &mut Ends) {
    let manager = std::sync::Arc::new(Manager::of_environment());
    let alive = manager.ready();
    ends.wait().await;
    // The end may take as long as its own limit says: the watchdog is for what serves.
    drop(alive);
    manager.stopping();
}

pub async fn up(args: UpArgs) -> Result<(), CliError> {
    let mut ends = Ends::new()?;
    let folder = Folder::create(&args.dir).map_err(RoleError::from)?;
    let up = tokio::select! {
        up = Up::start(&folder, args.listen) => up?,
        () = ends.wait() => return Ok(()),
    };
    Output::new(true).line(&up.ready_line(&folder))?;
    serve_until(&mut ends).await;
    tracing::info!("stopping");
    up.stop().await;
    Ok(())
}

pub async fn agent(args: RoleArgs) -> Result<(), CliError> {
    let mut ends = Ends::new()?;
    let running = agent::start(place(&args, Role::Agent)?).await?;
    serve_until(&mut ends).await;
    running.stop().await;
    Ok(())
}

pub async fn process_server(args: RoleArgs) -> Result<(), CliError> {
    let mut ends = Ends::new()?;
    let running = process_server::start(place(&args, Role::ProcessServer)?).await?;
    serve_until(&mut ends).await;
    running.stop().await;
    Ok(())
}

pub async fn config_server(args: RoleArgs) -> Result<(), CliError> {
    let mut ends = Ends::new()?;
    let (folder, settings) = config_server_place(&args)?;
    // A folder that is named in a configuration was set up before; an empty one is a mistake, or a volume that is not mounted.
    if args.dir.is_none() && !folder.is_in_use().map_err(RoleError::from)? {
        return Err(RoleError {
            message: format!("{} holds no installation", folder.path().display()),
            help: "check `dir` in the configuration, and that its volume is mounted; `tidemark config-server init` makes a new one".to_owned(),
        }
        .into());
    }
    let running = config_server::start(&folder, settings).await?;
    serve_until(&mut ends).await;
    running.server.stop().await;
    Ok(())
}

pub fn config_server_place(args: &RoleArgs) -> Result<(Folder, config_server::Settings), RoleError> {
    let (dir, settings) = match &args.dir {
        Some(dir) => (dir.clone(), config_server::Settings::default()),
        None => {
            let RoleConfig { dir, listen, control_listen, names, database, .. } = configured(args, Role::ConfigServer)?;
            (dir, config_server::Settings { listen, control_listen, names, database })
        }
    };
    Ok((Folder::create(&dir)?, settings))
}

/// The first set-up of a configuration server.
pub async fn init(args: RoleArgs, output: &Output) -> Result<(), CliError> {
    let (folder, settings) = config_server_place(&args)?;
    let made = config_server::init(&folder, &settings).await?;
    let (token_file, ca_file) = (folder.token_file(), folder.ca_file());
    if output.is_json() {
        let passphrase = |of: usize| made.passphrases.as_ref().map(|all| all[of].clone());
        return Ok(output.json(&json!({
            "initialised_before": made.before,
            "ca_fingerprint": made.fingerprint,
            "ca_file": ca_file,
            "token_file": token_file,
            "agent_passphrase": passphrase(0),
            "process_server_passphrase": passphrase(1),
            "recovery_key": made.recovery_key.map(|key| key.text()),
        }))?);
    }
    if let Some(before) = made.before {
        output.line(&format!(
            "{} was initialised already, at {before}; nothing of it was changed.",
            folder.path().display()
        ))?;
    }
    output.line(&format!("fingerprint of the authority  {}", made.fingerprint))?;
    output.line(&format!("its certificate               {}", ca_file.display()))?;
    output.line(&format!("token of the administrator    {}", token_file.display()))?;
    match &made.passphrases {
        Some([agent, server]) => {
            output.line("Passphrases, each for one registration within a day, shown this once:")?;
            output.line(&format!("  an agent                    {agent}"))?;
            output.line(&format!("  a process server            {server}"))?;
        }
        None => output.line("It runs; passphrases for registration are made with: tidemark passphrase create")?,
    }
    if let Some(key) = made.recovery_key {
        output.line(
            "The recovery key, shown this once. It opens backups of this configuration and fails over without it.",
        )?;
        output.line("Print it, and keep it where the loss of this site does not reach it:")?;
        return Ok(output.line(&format!("  {}", key.text()))?);
    }
    let place = match &args.dir {
        Some(dir) => format!("--dir {}", dir.display()),
        None => format!("--config {}", args.config.display()),
    };
    output.line("The recovery key was shown when it was made, and is not kept here. Where nobody has it any more, another one is")?;
    output
        .line(&format!("made while the configuration server is stopped: tidemark config-server recovery-key {place}"))
        .map_err(CliError::from)
}

/// Another token of the administrator, by whoever has the folder.
pub async fn rotate_token(args: RoleArgs, output: &Output) -> Result<(), CliError> {
    let (folder, _) = config_server_place(&args)?;
    let token_file = folder.token_file();
    if !token_file.exists() {
        return Err(CliError::new(
            format!("there is no {}", token_file.display()),
            "name the folder of a configuration server, with --dir or --config",
        ));
    }
    match folder.lock(Role::ConfigServer) {
        Ok(_lock) => folder.rotate_token().map_err(RoleError::from)?,
        // It runs, and has to know.
        Err(FolderError::InUse { .. }) => {
            Client::of_folder(folder.path())?.post("/token-file/rotate", &json!({})).await?;
        }
        Err(error) => return Err(RoleError::from(error).into()),
    }
    if output.is_json() {
        return Ok(output.json(&json!({ "token_file": token_file }))?);
    }
    output.line(&format!("{} holds another token; the one before is refused", token_file.display()))?;
    Ok(output.line("Backups from before hold the old one: rotate it again after one of them was restored.")?)
}

/// Gets a certificate for a role of this machine.
pub async fn register(role: Role, target: Target, args: RegisterArgs, output: &Output) -> Result<(), CliError> {
    let server = target.server.ok_or_else(|| {
        CliError::new("no server was named", "give --server https://HOST:PORT, the address of the configuration server")
    })?;
    let unreadable = |error: std::io::Error| {
        CliError::new(
            format!("cannot read the passphrase from {}: {error}", args.passphrase_file.display()),
            "name the file that holds it, or `-` for standard input",
        )
    };
    let passphrase = match args.passphrase_file.as_os_str() == "-" {
        true => std::io::read_to_string(std::io::stdin()).map_err(unreadable)?,
        false => std::fs::read_to_string(&args.passphrase_file).map_err(unreadable)?,
    };
    let dir = match args.dir {
        Some(dir) => dir,
        None => {
            let config = Config::read(&args.config)?.of(role);
            config.map(|config| config.dir).ok_or_else(|| {
                CliError::new(format!("{} has no section [{role}]", args.config.display()), "add it, or give --dir")
            })?
        }
    };
    let registration = Registration {
        role,
        server,
        passphrase,
        fingerprint: args.ca_fingerprint,
        name: args.name.unwrap_or_else(plain_host_name),
        dir,
        wait: !args.no_wait,
    };
    let tell = |text: &str| eprintln!("… {text}");
    match register::register(registration, tell).await? {
        Outcome::Registered { identity, control } => {
            if output.is_json() {
                let body = json!({ "state": "registered", "identity": identity.to_string(), "config_server": control });
                return Ok(output.json(&body)?);
            }
            output.line(&format!("registered as {identity}; the configuration server is at {control}"))?;
        }
        Outcome::Waiting { registration } => {
            if output.is_json() {
                return Ok(output.json(&json!({ "state": "waiting", "registration": registration }))?);
            }
            output.line(&format!("waiting for approval: tidemark process-server approve {registration}"))?;
        }
    }
    Ok(())
}

fn place(args: &RoleArgs, role: Role) -> Result<Place, RoleError> {
    match &args.dir {
        Some(dir) => Place::in_folder(&Folder::create(dir)?, role),
        None => Place::configured(configured(args, role)?, role),
    }
}

fn configured(args: &RoleArgs, role: Role) -> Result<RoleConfig, RoleError> {
    Config::read(&args.config)?.of(role).ok_or_else(|| RoleError {
        message: format!("{} has no section [{role}]", args.config.display()),
        help: "add the section, or run the role where it belongs".to_owned(),
    })
}
