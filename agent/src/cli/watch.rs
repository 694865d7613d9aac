//! Watching goes on while the configuration server is away, as while it is restarted or restored: it is asked again, less and less often.

use std::time::Duration;

use serde_json::Value;

use super::args::Target;
use crate::client::{Client, ClientError};

const PAUSE_MIN: Duration = Duration::from_millis(500);
const PAUSE_MAX: Duration = Duration::from_secs(15);

pub struct Watch {
    target: Target,
    client: Client,
    pause: Duration,
    has_answered: bool,
    is_away: bool,
}

impl Watch {
    pub fn new(target: &Target) -> Result<Self, ClientError> {
        let (client, target) = (target.client()?, target.clone());
        Ok(Self { target, client, pause: PAUSE_MIN, has_answered: false, is_away: false })
    }

    pub fn client(&self) -> &Client {
        &self.client
    }

    /// What is at `path`, as soon as the server answers. One that never answered is a mistake and not waited for; nor is one that refuses.
    /// May be dropped in between.
    pub async fn get(&mut self, path: &str) -> Result<Value, ClientError> {
        loop {
            match self.client.get(path).await {
                Ok(found) => {
                    if std::mem::take(&mut self.is_away) {
                        eprintln!("… the configuration server is back");
                    }
                    (self.pause, self.has_answered) = (PAUSE_MIN, true);
                    return Ok(found);
                }
                Err(error) => self.wait(error).await?,
            }
        }
    }

    /// Until it is worth asking again after this; it may be at another address by then.
    pub async fn wait(&mut self, error: ClientError) -> Result<(), ClientError> {
        if !self.has_answered || !is_passing(&error) {
            return Err(error);
        }
        if !std::mem::replace(&mut self.is_away, true) {
            eprintln!("… {error}; it is asked again until it answers");
        }
        tokio::time::interval_at(tokio::time::Instant::now() + self.pause, PAUSE_MAX).tick().await;
        self.pause = (self.pause * 2).min(PAUSE_MAX);
        if let Ok(client) = self.target.client() {
            self.client = client;
        }
        Ok(())
    }
}

fn is_passing(error: &ClientError) -> bool {
    matches!(error, ClientError::Unreachable { .. } | ClientError::Refused { status: 429 | 500 | 502 | 503 | 504, .. })
}
