//! Verbs that run a role, until SIGTERM or SIGINT.

use tidemark_transport::Role;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::CliError;
use super::args::{RoleArgs, UpArgs};
use super::output::Output;
use crate::folder::Folder;
use crate::roles::place::{Config, Place, RoleConfig};
use crate::roles::up::Up;
use crate::roles::{RoleError, agent, config_server, process_server};

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

pub async fn up(args: UpArgs) -> Result<(), CliError> {
    let mut ends = Ends::new()?;
    let folder = Folder::create(&args.dir).map_err(RoleError::from)?;
    let up = tokio::select! {
        up = Up::start(&folder, args.listen) => up?,
        () = ends.wait() => return Ok(()),
    };
    Output::new(true).line(&up.ready_line(&folder))?;
    ends.wait().await;
    tracing::info!("stopping");
    up.stop().await;
    Ok(())
}

pub async fn agent(args: RoleArgs) -> Result<(), CliError> {
    let mut ends = Ends::new()?;
    let running = agent::start(place(&args, Role::Agent)?).await?;
    ends.wait().await;
    running.stop().await;
    Ok(())
}

pub async fn process_server(args: RoleArgs) -> Result<(), CliError> {
    let mut ends = Ends::new()?;
    let running = process_server::start(place(&args, Role::ProcessServer)?).await?;
    ends.wait().await;
    running.stop().await;
    Ok(())
}

pub async fn config_server(args: RoleArgs) -> Result<(), CliError> {
    let mut ends = Ends::new()?;
    let (folder, listen, control) = match &args.dir {
        Some(dir) => (dir.clone(), None, None),
        None => {
            let config = configured(&args, Role::ConfigServer)?;
            (config.dir, config.listen, config.control_listen)
        }
    };
    let folder = Folder::create(&folder).map_err(RoleError::from)?;
    let running = config_server::start(&folder, listen, control).await?;
    ends.wait().await;
    running.server.stop().await;
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
