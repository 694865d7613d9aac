//! passphrase …, identity …, user …, token …, and approvals.

use hyper::Method;
use serde_json::{Value, json};

use super::CliError;
use super::args::{IdentityVerb, PassphraseVerb, ProcessServerVerb, RegisteringRole, TokenVerb, UserRoleArg, UserVerb};
use super::output::{Output, text};
use crate::client::{Client, escape};

pub async fn passphrase(client: &Client, verb: PassphraseVerb, output: &Output) -> Result<(), CliError> {
    match verb {
        PassphraseVerb::Create { role, lifetime, uses, replaces } => {
            let role = match role {
                RegisteringRole::Agent => "agent",
                RegisteringRole::ProcessServer => "process-server",
            };
            let request =
                json!({ "role": role, "lifetime_seconds": lifetime.as_secs(), "uses": uses, "replaces": replaces });
            secret(&client.post("/passphrases", &request).await?, "passphrase", output)
        }
        PassphraseVerb::List => {
            let columns = [("ID", "/id"), ("ROLE", "/role"), ("USES LEFT", "/uses_left"), ("EXPIRES", "/expires")];
            list(&client.get("/passphrases").await?, &columns, output)
        }
        PassphraseVerb::Delete { id } => {
            super::delete(client, &format!("/passphrases/{}", escape(&id)), "deleted", output).await
        }
    }
}

pub async fn identity(client: &Client, verb: IdentityVerb, output: &Output) -> Result<(), CliError> {
    let columns = [
        ("NAME", "/name"),
        ("STANDING", "/standing"),
        ("REASON", "/reason"),
        ("EXPIRES", "/expires"),
        ("IDENTITY", "/identity"),
    ];
    match verb {
        IdentityVerb::List => list(&client.get("/identities").await?, &columns, output),
        IdentityVerb::Revoke { identity, reason } => {
            let path = format!("/identities/{}/revoke", escape(&identity));
            list(&client.post(&path, &json!({ "reason": reason })).await?, &columns, output)
        }
        IdentityVerb::Restore { identity } => {
            let path = format!("/identities/{}/restore", escape(&identity));
            list(&client.post(&path, &json!({})).await?, &columns, output)
        }
    }
}

pub async fn user(client: &Client, verb: UserVerb, output: &Output) -> Result<(), CliError> {
    let columns = [("USER", "/name"), ("ROLE", "/role")];
    let role_name = |role| match role {
        UserRoleArg::Reader => "reader",
        UserRoleArg::Operator => "operator",
        UserRoleArg::Administrator => "administrator",
    };
    match verb {
        UserVerb::Create { name, role } => {
            let request = json!({ "name": name, "role": role_name(role) });
            list(&client.post("/users", &request).await?, &columns, output)
        }
        UserVerb::List => {
            let columns = [("USER", "/name"), ("ROLE", "/role"), ("NOTE", "/note")];
            list(&client.get("/users").await?, &columns, output)
        }
        UserVerb::Set { name, role } => {
            let (path, request) = (format!("/users/{}", escape(&name)), json!({ "role": role_name(role) }));
            list(&client.request(Method::PUT, &path, Some(&request)).await?, &columns, output)
        }
        UserVerb::Delete { name } => {
            super::delete(client, &format!("/users/{}", escape(&name)), "deleted", output).await
        }
    }
}

pub async fn token(client: &Client, verb: TokenVerb, output: &Output) -> Result<(), CliError> {
    match verb {
        TokenVerb::Create { user, label, lifetime } => {
            let lifetime = lifetime.map(|lifetime| lifetime.as_secs());
            let request = json!({ "user": user, "label": label, "lifetime_seconds": lifetime });
            secret(&client.post("/tokens", &request).await?, "token", output)
        }
        TokenVerb::List => {
            let columns = [("ID", "/id"), ("USER", "/user"), ("LABEL", "/label"), ("EXPIRES", "/expires")];
            list(&client.get("/tokens").await?, &columns, output)
        }
        TokenVerb::Delete { id } => super::delete(client, &format!("/tokens/{}", escape(&id)), "deleted", output).await,
    }
}

pub async fn registrations(client: &Client, verb: ProcessServerVerb, output: &Output) -> Result<(), CliError> {
    let columns = [
        ("REGISTRATION", "/id"),
        ("NAME", "/name"),
        ("FROM", "/address"),
        ("ASKED", "/asked"),
        ("APPROVED", "/approved"),
    ];
    let decide =
        async |id: &str, verb: &str| client.post(&format!("/registrations/{}/{verb}", escape(id)), &json!({})).await;
    match verb {
        ProcessServerVerb::Approve { registration } => list(&decide(&registration, "approve").await?, &columns, output),
        ProcessServerVerb::Reject { registration } => list(&decide(&registration, "reject").await?, &columns, output),
        ProcessServerVerb::Delete { process_server, force } => {
            let path = format!("/process-servers/{}?force={force}", escape(&process_server));
            super::delete(client, &path, &format!("process server {process_server} is deleted"), output).await
        }
        // Those who list are elsewhere, and roles ask no server.
        ProcessServerVerb::List
        | ProcessServerVerb::Show { .. }
        | ProcessServerVerb::Run(_)
        | ProcessServerVerb::Register(_) => Ok(()),
    }
}

/// Shown alone, so that it can go to a file.
fn secret(answer: &Value, field: &str, output: &Output) -> Result<(), CliError> {
    if output.is_json() {
        return Ok(output.json(answer)?);
    }
    Ok(output.line(answer[field].as_str().unwrap_or_default())?)
}

fn list(answer: &Value, columns: &[(&str, &str)], output: &Output) -> Result<(), CliError> {
    if output.is_json() {
        return Ok(output.json(answer)?);
    }
    let rows: Vec<&Value> = match answer {
        Value::Array(rows) => rows.iter().collect(),
        row => vec![row],
    };
    let header: Vec<&str> = columns.iter().map(|(name, _)| *name).collect();
    let rows: Vec<Vec<String>> =
        rows.into_iter().map(|row| columns.iter().map(|(_, at)| text(row, at)).collect()).collect();
    Ok(output.table(&header, &rows)?)
}
