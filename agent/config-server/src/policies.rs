//! Policies by name.

use std::sync::Arc;

use serde_json::{Map, Value, json};
use tidemark_proto::control::{Failure, FailureKind};

use crate::core::Core;
use crate::machines::{find_policy, settle_agent, settle_server};
use crate::model::{DEFAULT_POLICY, Policy, Wanted};
use crate::names::{bad_request, check_name};

pub fn show(name: &str, policy: &Policy) -> Value {
    let mut value = serde_json::to_value(policy).expect("a policy is plain data");
    value["name"] = json!(name);
    value
}

pub fn list(core: &Core) -> Vec<Value> {
    core.store.state().policies.iter().map(|(name, policy)| show(name, policy)).collect()
}

pub fn create(core: &Core, name: &str, settings: Map<String, Value>) -> Result<Value, Failure> {
    check_name("policy", name)?;
    let policy = with_settings(&Policy::default(), settings)?;
    core.store.change(|state| {
        if state.policies.contains_key(name) {
            return Err(Failure::new(
                FailureKind::Conflict,
                format!("there is a policy {name:?} already"),
                "change it with `tidemark policy set`, or choose another name",
            ));
        }
        state.policies.insert(name.to_owned(), policy.clone());
        Ok(())
    })?;
    Ok(show(name, &policy))
}

/// Changes the named settings and tells those that they concern; who is away is told on coming back.
pub async fn set(core: &Arc<Core>, name: &str, settings: Map<String, Value>) -> Result<Value, Failure> {
    let policy = core.store.change(|state| {
        let policy = with_settings(find_policy(state, name)?, settings)?;
        state.policies.insert(name.to_owned(), policy.clone());
        Ok(policy)
    })?;
    let state = core.store.state();
    for machine in state.machines.values().filter(|machine| machine.policy == name) {
        if matches!(machine.wanted, Wanted::Unprotected { .. }) {
            continue;
        }
        let _lock = core.lock(&machine.name).await;
        let outcome = async {
            let machine = core.machine(&machine.name)?;
            settle_server(core, &machine).await?;
            settle_agent(core, &machine).await.map(drop)
        };
        if let Err(failure) = outcome.await {
            tracing::info!(machine = machine.name, %failure, "the changed policy is not everywhere yet");
        }
    }
    Ok(show(name, &policy))
}

pub fn delete(core: &Core, name: &str) -> Result<(), Failure> {
    core.store.change(|state| {
        find_policy(state, name)?;
        let conflict = |what: String, help: &str| Err(Failure::new(FailureKind::Conflict, what, help));
        if name == DEFAULT_POLICY {
            return conflict(format!("policy {name:?} is the default"), "change it with `tidemark policy set` instead");
        }
        if let Some(machine) = state.machines.values().find(|machine| machine.policy == name) {
            return conflict(
                format!("policy {name:?} is in use by machine {:?}", machine.name),
                "give its machines another policy first",
            );
        }
        state.policies.remove(name);
        Ok(())
    })
}

fn with_settings(policy: &Policy, settings: Map<String, Value>) -> Result<Policy, Failure> {
    let mut value = serde_json::to_value(policy).expect("a policy is plain data");
    let fields = value.as_object_mut().expect("a policy is an object");
    fields.extend(settings);
    let policy: Policy = serde_json::from_value(value).map_err(|error| {
        bad_request(
            format!("not a policy: {error}"),
            "frequency is continuous, 30s, 5m or 15m; see `tidemark policy show continuous --json` for all settings",
        )
    })?;
    if !(-7..=22).contains(&policy.compression) {
        return Err(bad_request(
            format!("compression level {} does not exist", policy.compression),
            "choose a zstd level from 1 to 22, negative ones down to -7 for speed, or 0 for none",
        ));
    }
    Ok(policy)
}
