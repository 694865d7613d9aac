//! The REST API as the demonstration uses it: one question after another.

use std::time::{Duration, Instant};

use hyper::Method;
use serde_json::{Value, json};
use tidemark_base::stop::Stop;
use tokio::runtime::Runtime;

use crate::cli::CliError;
use crate::client::{Client, escape};

const ASK_EVERY: Duration = Duration::from_millis(100);

pub struct Api {
    runtime: Runtime,
    client: Client,
}

impl Api {
    pub fn new(client: Client) -> Result<Self, CliError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(CliError::runtime)?;
        Ok(Self { runtime, client })
    }

    pub fn get(&self, path: &str) -> Result<Value, CliError> {
        Ok(self.runtime.block_on(self.client.get(path))?)
    }

    pub fn post(&self, path: &str, body: &Value) -> Result<Value, CliError> {
        Ok(self.runtime.block_on(self.client.post(path, body))?)
    }

    pub fn delete(&self, path: &str) -> Result<Value, CliError> {
        Ok(self.runtime.block_on(self.client.request(Method::DELETE, path, None))?)
    }

    /// Starts a job and waits for its result.
    pub fn job(&self, path: &str, body: &Value) -> Result<Value, CliError> {
        Ok(self.runtime.block_on(async {
            let job = self.client.post(path, body).await?;
            self.client.finish(job, |_| {}).await
        })?)
    }

    pub fn status(&self, machine: &str) -> Result<Value, CliError> {
        self.get(&format!("/machines/{}", escape(machine)))
    }

    pub fn point(&self, machine: &str, app_consistent: bool, label: &str) -> Result<Value, CliError> {
        let request = json!({ "app_consistent": app_consistent, "label": label });
        self.job(&format!("/machines/{}/points", escape(machine)), &request)
    }

    /// Asks for the status until `done` says so.
    pub fn wait(
        &self,
        machine: &str,
        what: &str,
        limit: Duration,
        mut done: impl FnMut(&Value) -> bool,
    ) -> Result<Value, CliError> {
        let deadline = Instant::now() + limit;
        let never = Stop::new();
        loop {
            let status = self.status(machine)?;
            if done(&status) {
                return Ok(status);
            }
            if Instant::now() > deadline {
                return Err(CliError::new(
                    format!("{what} did not happen within {} s; the status is {status}", limit.as_secs()),
                    "see the demonstration's log; --keep leaves it",
                ));
            }
            never.wait_for(ASK_EVERY);
        }
    }
}
