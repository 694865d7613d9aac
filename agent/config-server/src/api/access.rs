//! Who a request is from, and what they may do.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use serde_json::json;
use tidemark_base::Clock;

use crate::core::Core;
use crate::identity::hex_encode;
use crate::model::UserRole;

/// The first administrator's token, which a file holds, kept as its digest.
#[derive(Clone)]
pub struct Access(Arc<blake3::Hash>);

/// Whose token was shown.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Caller {
    pub user: String,
    pub role: UserRole,
}

/// The user of the token in the file.
pub const FIRST_USER: &str = "admin";

impl Access {
    pub fn new(text: &str) -> Self {
        Self(Arc::new(blake3::hash(text.trim().as_bytes())))
    }

    fn caller(&self, core: &Core, header: Option<&HeaderValue>) -> Option<Caller> {
        let given = header?.to_str().ok()?.strip_prefix("Bearer ")?;
        let digest = blake3::hash(given.trim().as_bytes());
        // `blake3::Hash` compares in constant time.
        if digest == *self.0 {
            return Some(Caller { user: FIRST_USER.to_owned(), role: UserRole::Administrator });
        }
        // Finding a digest tells nothing of the token: nobody can choose what it hashes to.
        let (state, digest, now) = (core.store.state(), hex_encode(digest.as_bytes()), core.clock.wall_now());
        let token = state.tokens.values().find(|token| token.digest == digest)?;
        if token.expires.is_some_and(|expires| expires <= now) {
            return None;
        }
        let user = state.users.get(&token.user)?;
        Some(Caller { user: token.user.clone(), role: user.role })
    }
}

/// Refuses whoever does not show a token, and notes who it is.
pub async fn require_token(
    State((core, access)): State<(Arc<Core>, Access)>,
    mut request: Request,
    next: Next,
) -> Response {
    let Some(caller) = access.caller(&core, request.headers().get(header::AUTHORIZATION)) else {
        let body = json!({
            "error": "the request shows no valid token",
            "help": "send `Authorization: Bearer TOKEN`; the token is in the file that the server's ready line names (--token-file)",
        });
        return (StatusCode::UNAUTHORIZED, [(header::WWW_AUTHENTICATE, "Bearer")], axum::Json(body)).into_response();
    };
    request.extensions_mut().insert(caller);
    next.run(request).await
}

/// Refuses whoever has not the role.
pub async fn guard(State(needed): State<UserRole>, request: Request, next: Next) -> Response {
    match request.extensions().get::<Caller>() {
        Some(caller) if caller.role >= needed => next.run(request).await,
        caller => {
            let name = |role: UserRole| match role {
                UserRole::Reader => "reader",
                UserRole::Operator => "operator",
                UserRole::Administrator => "administrator",
            };
            let who = caller.map_or("nobody".to_owned(), |caller| format!("{} ({})", caller.user, name(caller.role)));
            let body = json!({
                "error": format!("this needs the role {}; the token is of {who}", name(needed)),
                "help": "use the token of somebody who has it, or have an administrator change the user's role",
            });
            (StatusCode::FORBIDDEN, axum::Json(body)).into_response()
        }
    }
}
