//! Who a request is from, and what they may do.

use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::extract::{ConnectInfo, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures_util::{Stream, StreamExt};
use tidemark_base::Clock;
use tidemark_base::storage::{Storage, replace_file};
use tidemark_proto::control::Severity;
use uuid::Uuid;

use super::refusals::refusal;
use crate::core::Core;
use crate::history::{Actor, News};
use crate::identity::hex_encode;
use crate::model::UserRole;

/// How often it is looked whether whoever follows a stream may still do so.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// The first administrator's token, which a file holds, kept as its digest.
#[derive(Clone)]
pub struct Access {
    token: Arc<Mutex<blake3::Hash>>,
    /// Of the file.
    storage: Arc<dyn Storage>,
}

/// Whose token was shown.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Caller {
    pub user: String,
    pub role: UserRole,
    /// Where the request came from.
    pub address: Option<IpAddr>,
}

impl Caller {
    /// As events name whoever did something.
    pub fn actor(&self) -> Actor {
        Actor { user: self.user.clone(), address: self.address.map(|address| address.to_string()) }
    }

    /// Leaves an event of what was done.
    pub fn did(&self, core: &Core, kind: &'static str, message: String) {
        let news = News { severity: Severity::Info, kind, machine: None, message, help: String::new() };
        core.history.note_by(Some(self.actor()), news);
    }
}

/// In the configuration server's folder.
pub const TOKEN_FILE: &str = "token";
/// The user of the token in the file.
pub const FIRST_USER: &str = "admin";

impl Access {
    /// `text` is what the file [`TOKEN_FILE`] in `storage` holds.
    pub fn new(text: &str, storage: Arc<dyn Storage>) -> Self {
        Self { token: Arc::new(Mutex::new(blake3::hash(text.trim().as_bytes()))), storage }
    }

    /// Writes another token into the file; the one before is refused when this returns. Blocks.
    pub fn rotate(&self) -> io::Result<String> {
        let mut token = self.token.lock().expect("no panic while held");
        let text = write_token(&*self.storage)?;
        *token = blake3::hash(text.as_bytes());
        Ok(text)
    }

    fn caller(&self, core: &Core, header: Option<&HeaderValue>) -> Option<Caller> {
        let given = header?.to_str().ok()?.strip_prefix("Bearer ")?;
        let digest = blake3::hash(given.trim().as_bytes());
        // `blake3::Hash` compares in constant time.
        if digest == *self.token.lock().expect("no panic while held") {
            return Some(Caller { user: FIRST_USER.to_owned(), role: UserRole::Administrator, address: None });
        }
        // Finding a digest tells nothing of the token: nobody can choose what it hashes to.
        let (state, digest, now) = (core.store.state(), hex_encode(digest.as_bytes()), core.clock.wall_now());
        let token = state.tokens.values().find(|token| token.digest == digest)?;
        if token.expires.is_some_and(|expires| expires <= now) {
            return None;
        }
        let user = state.users.get(&token.user)?;
        Some(Caller { user: token.user.clone(), role: user.role, address: None })
    }
}

/// Makes a token and writes it into the file.
pub fn write_token(storage: &dyn Storage) -> io::Result<String> {
    let text = new_token();
    replace_file(storage, TOKEN_FILE, format!("{text}\n").as_bytes())?;
    Ok(text)
}

/// 244 random bits.
pub fn new_token() -> String {
    format!("{}{}", Uuid::new_v4().simple(), Uuid::new_v4().simple())
}

/// By what a request was let in, for answers that go on: the token may be deleted or expire meanwhile, its user too.
#[derive(Clone)]
pub struct Ticket {
    core: Arc<Core>,
    access: Access,
    header: Option<HeaderValue>,
    caller: Caller,
}

impl Ticket {
    /// Whether it would be let in again, as the same user, to what readers may.
    pub fn holds(&self) -> bool {
        self.access.caller(&self.core, self.header.as_ref()).is_some_and(|caller| caller.user == self.caller.user)
    }

    /// Nothing is told after it stopped to hold, and the stream ends soon after.
    pub fn while_it_holds<T>(self, told: impl Stream<Item = T>) -> impl Stream<Item = T> {
        let looking = self.clone();
        let ended = async move {
            let mut looks = tokio::time::interval(LOOK_EVERY);
            while looking.holds() {
                looks.tick().await;
            }
        };
        told.take_while(move |_| std::future::ready(self.holds())).take_until(ended)
    }
}

pub fn no_token() -> Response {
    let help = "send `Authorization: Bearer TOKEN`; the token is in the file that the server's ready line names (--token-file)";
    let refused = refusal(StatusCode::UNAUTHORIZED, "the request shows no valid token", help);
    ([(header::WWW_AUTHENTICATE, "Bearer")], refused).into_response()
}

/// Refuses whoever does not show a token, and notes who it is.
pub async fn require_token(
    State((core, access)): State<(Arc<Core>, Access)>,
    mut request: Request,
    next: Next,
) -> Response {
    let header = request.headers().get(header::AUTHORIZATION).cloned();
    let Some(caller) = access.caller(&core, header.as_ref()) else {
        return no_token();
    };
    let from = request.extensions().get::<ConnectInfo<super::listen::From>>();
    let address = from.map(|ConnectInfo(super::listen::From(from))| from.ip().to_canonical());
    let caller = Caller { address, ..caller };
    request.extensions_mut().insert(caller.clone());
    request.extensions_mut().insert(Ticket { core, access, header, caller });
    next.run(request).await
}

/// Refuses whoever has not the role.
pub async fn guard(State(needed): State<UserRole>, request: Request, next: Next) -> Response {
    match request.extensions().get::<Caller>() {
        Some(caller) if caller.role >= needed => next.run(request).await,
        caller => {
            let who = caller.map_or("nobody".to_owned(), |caller| format!("{} ({})", caller.user, caller.role.name()));
            let error = format!("this needs the role {}; the token is of {who}", needed.name());
            let help = "use the token of somebody who has it, or have an administrator change the user's role";
            refusal(StatusCode::FORBIDDEN, error, help)
        }
    }
}
