//! The agent as a service of Windows: installed, removed, and run by the service manager.
//!
//! *Consistency.* The service is `running` once it answers the manager; what keeps the agent from its work is in its log. *Retries.* The manager
//! starts it again when it ends with an error. *Cancellation.* A stop, also that of the system, leaves every disk cleanly: the manager is told
//! how long that may take. *Crash.* As any kill of the agent.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tidemark_base::stop::Stop;
use tokio::sync::Notify;
use windows_service::service::{
    ServiceAccess, ServiceAction, ServiceActionType, ServiceControl, ServiceControlAccept, ServiceErrorControl,
    ServiceExitCode, ServiceFailureActions, ServiceFailureResetPeriod, ServiceInfo, ServiceStartType, ServiceState,
    ServiceStatus, ServiceType,
};
use windows_service::service_control_handler::{self, ServiceControlHandlerResult, ServiceStatusHandle};
use windows_service::service_manager::{ServiceManager, ServiceManagerAccess};
use windows_service::{define_windows_service, service_dispatcher};

use crate::roles::RoleError;

const NAME: &str = "TidemarkAgent";
const SHOWN: &str = "Tidemark Agent";
const DESCRIPTION: &str = "Records every change to protected disks and sends them to another site.";
/// How long leaving all disks may take.
const STOP_LIMIT: Duration = Duration::from_secs(120);
const LOOK_AGAIN: Duration = Duration::from_millis(100);
const RESTART_AFTER: [Duration; 3] = [Duration::from_secs(5), Duration::from_secs(30), Duration::from_secs(60)];
/// What a service that ended with an error of its own tells the manager.
const FAILED: u32 = 1;

fn refused(what: &str) -> impl FnOnce(windows_service::Error) -> RoleError + '_ {
    move |error| RoleError {
        message: format!("cannot {what} the service: {}", tidemark_base::error::with_causes(&error)),
        help: "do it as an administrator; `services.msc` shows the service".to_owned(),
    }
}

fn manager(access: ServiceManagerAccess) -> Result<ServiceManager, RoleError> {
    ServiceManager::local_computer(None::<&OsStr>, access).map_err(refused("reach the manager of"))
}

/// What is installed: this program, told to run as a service with that configuration.
fn description(config: &Path) -> Result<ServiceInfo, RoleError> {
    let unusable = |error: std::io::Error| RoleError::new(&error, "see the system's message");
    let config = std::path::absolute(config).map_err(unusable)?;
    let mut launch_arguments: Vec<OsString> = ["agent", "service", "run", "--config"].map(OsString::from).into();
    launch_arguments.push(config.into_os_string());
    Ok(ServiceInfo {
        name: NAME.into(),
        display_name: SHOWN.into(),
        service_type: ServiceType::OWN_PROCESS,
        start_type: ServiceStartType::AutoStart,
        error_control: ServiceErrorControl::Normal,
        executable_path: std::env::current_exe().map_err(unusable)?,
        launch_arguments,
        dependencies: Vec::new(),
        // LocalSystem: what reads other programs' disks.
        account_name: None,
        account_password: None,
    })
}

pub fn install(config: &Path) -> Result<(), RoleError> {
    // What would keep it from starting is said here, and not in a log.
    super::settings(config)?;
    let manager = manager(ServiceManagerAccess::CONNECT | ServiceManagerAccess::CREATE_SERVICE)?;
    let access = ServiceAccess::CHANGE_CONFIG | ServiceAccess::START | ServiceAccess::QUERY_STATUS;
    let service = manager.create_service(&description(config)?, access).map_err(refused("install"))?;
    let actions = RESTART_AFTER.map(|delay| ServiceAction { action_type: ServiceActionType::Restart, delay });
    let settings = || {
        service.set_description(DESCRIPTION)?;
        service.set_preshutdown_timeout(STOP_LIMIT)?;
        service.set_failure_actions_on_non_crash_failures(true)?;
        service.update_failure_actions(ServiceFailureActions {
            reset_period: ServiceFailureResetPeriod::After(Duration::from_secs(3600)),
            reboot_msg: None,
            command: None,
            actions: Some(actions.to_vec()),
        })
    };
    settings().map_err(refused("set up"))?;
    service.start::<&OsStr>(&[]).map_err(refused("start"))?;
    println!("{SHOWN} is installed, and started");
    Ok(())
}

pub fn remove() -> Result<(), RoleError> {
    let manager = manager(ServiceManagerAccess::CONNECT)?;
    let access = ServiceAccess::QUERY_STATUS | ServiceAccess::STOP | ServiceAccess::DELETE;
    let service = manager.open_service(NAME, access).map_err(refused("find"))?;
    let state = || service.query_status().map(|status| status.current_state).map_err(refused("ask"));
    if state()? != ServiceState::Stopped {
        service.stop().map_err(refused("stop"))?;
        let (deadline, never) = (Instant::now() + STOP_LIMIT, Stop::new());
        while state()? != ServiceState::Stopped {
            if Instant::now() >= deadline {
                return Err(RoleError {
                    message: format!("the service did not stop within {} s", STOP_LIMIT.as_secs()),
                    help: "see its log; try again once it stopped".to_owned(),
                });
            }
            never.wait_for(LOOK_AGAIN);
        }
    }
    service.delete().map_err(refused("remove"))?;
    println!("{SHOWN} is removed; what it keeps is where it was");
    Ok(())
}

/// What the manager's thread needs; the macro's function takes none of ours.
static CONFIG: Mutex<Option<PathBuf>> = Mutex::new(None);

define_windows_service!(service_main, serve);

/// Returns when the service ended.
pub fn run(config: PathBuf) -> Result<(), RoleError> {
    *CONFIG.lock().expect("no panic while held") = Some(config);
    service_dispatcher::start(NAME, service_main).map_err(|error| RoleError {
        message: format!("this is run by Windows alone: {}", tidemark_base::error::with_causes(&error)),
        help: "`tidemark agent service install` has Windows run it; `tidemark agent run` runs it here".to_owned(),
    })
}

fn status(state: ServiceState, exit: ServiceExitCode) -> ServiceStatus {
    let accepted = match state {
        ServiceState::Running => ServiceControlAccept::STOP | ServiceControlAccept::PRESHUTDOWN,
        _ => ServiceControlAccept::empty(),
    };
    ServiceStatus {
        service_type: ServiceType::OWN_PROCESS,
        current_state: state,
        controls_accepted: accepted,
        exit_code: exit,
        checkpoint: 0,
        wait_hint: if state == ServiceState::StopPending { STOP_LIMIT } else { Duration::ZERO },
        process_id: None,
    }
}

fn serve(_arguments: Vec<OsString>) {
    let config = CONFIG.lock().expect("no panic while held").take().unwrap_or_else(super::configuration);
    let ends = Arc::new(Notify::new());
    let told = ends.clone();
    let handler = move |control| match control {
        ServiceControl::Interrogate => ServiceControlHandlerResult::NoError,
        ServiceControl::Stop | ServiceControl::Preshutdown => {
            // Kept until somebody waits.
            told.notify_one();
            ServiceControlHandlerResult::NoError
        }
        _ => ServiceControlHandlerResult::NotImplemented,
    };
    let manager = match service_control_handler::register(NAME, handler) {
        Ok(manager) => manager,
        Err(error) => return tracing::error!(%error, "the service manager does not listen"),
    };
    tell(&manager, ServiceState::Running, ServiceExitCode::NO_ERROR);
    let stopping = || {
        Ok(async {
            ends.notified().await;
            tell(&manager, ServiceState::StopPending, ServiceExitCode::NO_ERROR);
        })
    };
    let exit = match super::run(&config, stopping) {
        Ok(()) => ServiceExitCode::NO_ERROR,
        Err(error) => {
            tracing::error!(help = error.help, "{}", error.message);
            ServiceExitCode::ServiceSpecific(FAILED)
        }
    };
    tell(&manager, ServiceState::Stopped, exit);
}

fn tell(manager: &ServiceStatusHandle, state: ServiceState, exit: ServiceExitCode) {
    if let Err(error) = manager.set_service_status(status(state, exit)) {
        tracing::warn!(%error, "the service manager could not be told");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_windows_runs_is_this_program_with_the_configuration() {
        let info = description(Path::new(r"C:\a b\tidemark.toml")).unwrap();
        assert_eq!(info.executable_path, std::env::current_exe().unwrap());
        assert_eq!(info.launch_arguments, ["agent", "service", "run", "--config", r"C:\a b\tidemark.toml"]);
        use clap::Parser;
        let arguments = [OsString::from("tidemark")].into_iter().chain(info.launch_arguments);
        super::super::Cli::try_parse_from(arguments).unwrap();
    }

    #[test]
    fn a_stop_is_taken_while_it_runs_and_may_take_its_time() {
        let of = |state| status(state, ServiceExitCode::NO_ERROR);
        assert!(of(ServiceState::Running).controls_accepted.contains(ServiceControlAccept::STOP));
        assert!(of(ServiceState::Stopped).controls_accepted.is_empty());
        assert_eq!(of(ServiceState::StopPending).wait_hint, STOP_LIMIT);
    }
}
