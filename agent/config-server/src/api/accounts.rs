//! Who may use the API, and who may register: users and their tokens, passphrases, registrations, identities.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::{ConnectInfo, Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tidemark_base::{Clock, Timestamp};
use tidemark_proto::control::{Failure, FailureKind, Severity};
use utoipa::ToSchema;
use uuid::Uuid;

use super::access::{Access, Caller, FIRST_USER, new_token};
use super::repeat::ShownOnce;
use super::routes::parse;
use super::{Answer, blocking, ok};
use crate::core::Core;
use crate::history::News;
use crate::identity::{PassphraseRequest, RegisterRequest, hex_encode};
use crate::model::{ApiToken, PeerRole, User, UserRole};
use crate::names::{check_label, check_name};

type App = State<Arc<Core>>;
type Who = axum::Extension<Caller>;

/// Tokens of one user; more are refused.
const TOKENS_MAX: usize = 100;

#[derive(Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct UserBody {
    pub name: String,
    pub role: UserRole,
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenRequest {
    pub user: String,
    #[serde(default)]
    pub label: String,
    /// Absent: it does not expire.
    #[serde(default)]
    pub lifetime_seconds: Option<u64>,
}

#[derive(Serialize, ToSchema)]
pub struct TokenInfo {
    pub id: String,
    pub user: String,
    pub label: String,
    #[schema(value_type = String, format = "date-time")]
    pub created: Timestamp,
    #[schema(value_type = Option<String>, format = "date-time")]
    pub expires: Option<Timestamp>,
    /// Only in the answer to its creation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
}

/// A user as it is listed.
#[derive(Serialize, ToSchema)]
pub struct UserInfo {
    pub name: String,
    pub role: UserRole,
    /// What is special about it.
    pub note: Option<&'static str>,
}

const FIRST_NOTE: &str = "of the first set-up: its token is in a file on the configuration server, and stays";

/// The one of the first set-up is none of those that can be changed.
fn check_not_first(name: &str) -> Result<(), Failure> {
    if name != FIRST_USER {
        return Ok(());
    }
    Err(Failure::new(
        FailureKind::Conflict,
        format!("{FIRST_USER} is the administrator of the first set-up, and stays what it is"),
        "where its token is known to others: `tidemark config-server rotate-token` on the configuration server writes \
         another one, and the one before is refused at once",
    ))
}

fn not_found(what: impl Into<String>, help: &str) -> Failure {
    Failure::new(FailureKind::NotFound, what, help)
}

pub async fn list_users(State(core): App) -> Answer {
    let state = core.store.state();
    let first = UserInfo { name: FIRST_USER.to_owned(), role: UserRole::Administrator, note: Some(FIRST_NOTE) };
    let others = state.users.iter().map(|(name, user)| UserInfo { name: name.clone(), role: user.role, note: None });
    ok(std::iter::once(first).chain(others).collect::<Vec<_>>())
}

pub async fn create_user(State(core): App, who: Who, body: Bytes) -> Answer {
    let UserBody { name, role } = parse(&body)?;
    check_name("user", &name)?;
    let created = core.clock.wall_now();
    let taken = Failure::new(
        FailureKind::Conflict,
        format!("there is a user {name:?} already"),
        "`tidemark user set` changes the role; or choose another name",
    );
    let (user, changing) = (name.clone(), core.clone());
    blocking(move || {
        changing.store.change(|state| {
            if user == FIRST_USER || state.users.contains_key(&user) {
                return Err(taken);
            }
            state.users.insert(user.clone(), User { role, created });
            Ok(())
        })
    })
    .await?;
    who.did(&core, "user_created", format!("user {name} was created, with the role {}", role.name()));
    ok(UserBody { name, role })
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RoleBody {
    pub role: UserRole,
}

pub async fn set_user(State(core): App, who: Who, Path(name): Path<String>, body: Bytes) -> Answer {
    let RoleBody { role } = parse(&body)?;
    check_not_first(&name)?;
    let (user, changing) = (name.clone(), core.clone());
    let before = blocking(move || {
        changing.store.change(|state| {
            let user = state.users.get_mut(&user);
            let user = user.ok_or_else(|| not_found("there is no such user", "see `tidemark user list`"))?;
            Ok(std::mem::replace(&mut user.role, role))
        })
    })
    .await?;
    who.did(&core, "user_changed", format!("user {name}, who was {}, is {}", before.name(), role.name()));
    ok(UserBody { name, role })
}

pub async fn delete_user(State(core): App, who: Who, Path(name): Path<String>) -> Answer {
    check_not_first(&name)?;
    let (user, changing) = (name.clone(), core.clone());
    blocking(move || {
        changing.store.change(|state| {
            state.users.remove(&user).ok_or_else(|| not_found("there is no such user", "see `tidemark user list`"))?;
            state.tokens.retain(|_, token| token.user != user);
            Ok(())
        })
    })
    .await?;
    who.did(&core, "user_deleted", format!("user {name} was deleted, with all tokens"));
    ok(json!({}))
}

fn token_info(id: &str, token: &ApiToken, text: Option<String>) -> TokenInfo {
    TokenInfo {
        id: id.to_owned(),
        user: token.user.clone(),
        label: token.label.clone(),
        created: token.created,
        expires: token.expires,
        token: text,
    }
}

pub async fn list_tokens(State(core): App) -> Answer {
    let state = core.store.state();
    ok(state.tokens.iter().map(|(id, token)| token_info(id, token, None)).collect::<Vec<_>>())
}

pub async fn create_token(State(core): App, who: Who, body: Bytes) -> Answer {
    let TokenRequest { user, label, lifetime_seconds } = parse(&body)?;
    check_label(&label)?;
    let text = new_token();
    let created = core.clock.wall_now();
    let lifetime = lifetime_seconds.map(Duration::from_secs);
    let expires = lifetime.map(|of| Timestamp(created.0.saturating_add(of.as_nanos().min(u64::MAX.into()) as u64)));
    let digest = hex_encode(blake3::hash(text.as_bytes()).as_bytes());
    let token = ApiToken { user, label, digest, created, expires };
    let id: String = Uuid::new_v4().simple().to_string().chars().take(12).collect();
    let (key, kept, changing) = (id.clone(), token.clone(), core.clone());
    blocking(move || {
        changing.store.change(|state| {
            if !state.users.contains_key(&kept.user) {
                return Err(not_found(
                    format!("there is no user {:?} who could have tokens", kept.user),
                    "`tidemark user create` makes one; the first token, of whoever set the server up, is renewed by `config-server rotate-token`",
                ));
            }
            if state.tokens.values().filter(|known| known.user == kept.user).count() >= TOKENS_MAX {
                return Err(Failure::new(
                    FailureKind::Conflict,
                    format!("user {} has {TOKENS_MAX} tokens, which is the limit", kept.user),
                    "delete those that are not used any more",
                ));
            }
            state.tokens.insert(key, kept);
            Ok(())
        })
    })
    .await?;
    let until = expires.map_or_else(|| "does not expire".to_owned(), |expires| format!("expires at {expires}"));
    who.did(
        &core,
        "token_created",
        format!("token {id} ({:?}) of user {} was made; it {until}", token.label, token.user),
    );
    let help = format!("delete it (DELETE /tokens/{id}), and make another with a new key");
    let instead = ShownOnce::new(&format!("the token {id} of {}", token.user), help);
    Ok(shown_once(token_info(&id, &token, Some(text)), instead))
}

/// Of the first set-up.
pub async fn rotate_token_file(State(core): App, who: Who, axum::Extension(access): axum::Extension<Access>) -> Answer {
    let rotated = access.clone();
    let text = blocking(move || {
        rotated.rotate().map_err(|error| {
            Failure::from_error(FailureKind::Failed, &error, "check the owner, the mode and the room of its folder")
        })
    })
    .await?;
    core.backups.set_token(text);
    let news = News {
        severity: Severity::Info,
        kind: "token_rotated",
        machine: None,
        message: format!("the token of {FIRST_USER}, which is in a file, is another one"),
        help: "backups from before hold the old one: rotate it again after one of them was restored".to_owned(),
    };
    core.history.note_by(Some(who.actor()), news);
    ok(json!({}))
}

pub async fn delete_token(State(core): App, who: Who, Path(id): Path<String>) -> Answer {
    let (key, changing) = (id.clone(), core.clone());
    let token = blocking(move || {
        changing.store.change(|state| {
            let token = state.tokens.remove(&key);
            token.ok_or_else(|| not_found("there is no such token", "see `tidemark token list`"))
        })
    })
    .await?;
    who.did(&core, "token_deleted", format!("token {id} ({:?}) of user {} was deleted", token.label, token.user));
    ok(json!({}))
}

// ---- registering

pub async fn list_passphrases(State(core): App) -> Answer {
    ok(core.registrar.passphrases())
}

pub async fn create_passphrase(State(core): App, who: Who, body: Bytes) -> Answer {
    let request: PassphraseRequest = parse(&body)?;
    let registrar = core.registrar.clone();
    let made = blocking(move || registrar.create_passphrase(&request)).await?;
    let of = made.replaces.as_ref().map_or(String::new(), |identity| format!(", in the place of {identity}"));
    let (role, uses, until) = (made.role.name(), made.uses_left, made.expires);
    let message = format!("passphrase {} was made: {uses} registrations of the role {role} until {until}{of}", made.id);
    who.did(&core, "passphrase_created", message);
    let help = format!("delete it (DELETE /passphrases/{}), and make another with a new key", made.id);
    Ok(shown_once(&made, ShownOnce::new(&format!("the passphrase {}", made.id), help)))
}

/// It is shown once: nobody on the way is to keep it.
fn shown_once(body: impl Serialize, instead: ShownOnce) -> Response {
    let mut answer = axum::Json(body).into_response();
    answer.headers_mut().insert("cache-control", axum::http::HeaderValue::from_static("no-store"));
    answer.extensions_mut().insert(instead);
    answer
}

pub async fn delete_passphrase(State(core): App, who: Who, Path(id): Path<String>) -> Answer {
    let (registrar, deleted) = (core.registrar.clone(), id.clone());
    blocking(move || registrar.delete_passphrase(&deleted)).await?;
    who.did(&core, "passphrase_deleted", format!("passphrase {id} was deleted"));
    ok(json!({}))
}

/// Where the control streams are dialled, on the host that answered.
#[derive(Clone, Copy)]
pub struct ControlPort(pub u16);

pub async fn register(
    State(core): App,
    axum::Extension(ControlPort(port)): axum::Extension<ControlPort>,
    ConnectInfo(super::listen::From(from)): ConnectInfo<super::listen::From>,
    body: Bytes,
) -> Answer {
    let request: RegisterRequest = parse(&body)?;
    let (registrar, from): (_, SocketAddr) = (core.registrar.clone(), from);
    let registered = blocking(move || registrar.register(from.ip(), &request)).await?;
    let mut body = serde_json::to_value(&registered).expect("a registration is plain data");
    body["control_port"] = json!(port);
    let is_waiting = matches!(registered, crate::identity::Registered::Waiting { .. });
    let status = if is_waiting { StatusCode::ACCEPTED } else { StatusCode::OK };
    Ok((status, axum::Json(body)).into_response())
}

/// What waits for an operator.
#[derive(Serialize, ToSchema)]
pub struct RegistrationInfo {
    pub id: String,
    pub role: PeerRole,
    pub name: String,
    pub address: String,
    #[schema(value_type = String, format = "date-time")]
    pub asked: Timestamp,
    pub approved: bool,
}

fn registration_info(id: String, of: &crate::model::Registration) -> RegistrationInfo {
    RegistrationInfo {
        id,
        role: of.role,
        name: of.name.clone(),
        address: of.address.clone(),
        asked: of.asked,
        approved: of.approved,
    }
}

pub async fn list_registrations(State(core): App) -> Answer {
    let all = core.registrar.registrations();
    ok(all.into_iter().map(|(id, of)| registration_info(id, &of)).collect::<Vec<_>>())
}

pub async fn approve(State(core): App, who: Who, Path(id): Path<String>) -> Answer {
    let (registrar, known, by) = (core.registrar.clone(), id.clone(), who.actor());
    let decided = blocking(move || registrar.decide(&known, true, Some(by))).await?;
    ok(registration_info(id, &decided))
}

pub async fn reject(State(core): App, who: Who, Path(id): Path<String>) -> Answer {
    let (registrar, known, by) = (core.registrar.clone(), id.clone(), who.actor());
    let decided = blocking(move || registrar.decide(&known, false, Some(by))).await?;
    ok(registration_info(id, &decided))
}

pub async fn list_identities(State(core): App) -> Answer {
    ok(core.registrar.identities())
}

#[derive(Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RevokeBody {
    pub reason: String,
}

pub async fn revoke(State(core): App, who: Who, Path(id): Path<String>, body: Bytes) -> Answer {
    let RevokeBody { reason } = parse(&body)?;
    check_label(&reason)?;
    let reason = if reason.is_empty() { "no reason was given".to_owned() } else { reason };
    let (registrar, by) = (core.registrar.clone(), who.actor());
    ok(blocking(move || registrar.set_standing(&id, Some(reason), Some(by))).await?)
}

pub async fn restore(State(core): App, who: Who, Path(id): Path<String>) -> Answer {
    let (registrar, by) = (core.registrar.clone(), who.actor());
    ok(blocking(move || registrar.set_standing(&id, None, Some(by))).await?)
}
