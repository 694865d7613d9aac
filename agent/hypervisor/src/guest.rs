//! The guest agent's protocol (QEMU's, which other hypervisors pass through): lines of JSON, one question at a time.
//!
//! Each connection begins with a sync: a byte that no JSON has, so that the agent drops what was left of an earlier question,
//! and a number that it repeats, so that we drop what was left of an earlier answer.
//!
//! *Freeze.* [`freeze`] thaws when its limit is over, whatever its caller does meanwhile; a limit past [`FREEZE_MAX`] is
//! shortened to it. Dropping the [`Frozen`] thaws too.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::sync::oneshot;
use uuid::Uuid;

use crate::error::HypervisorError;
use crate::hypervisor::{Hypervisor, Question};

/// The longest that a guest is ever frozen.
pub const FREEZE_MAX: Duration = Duration::from_secs(10);
const THAW_LIMIT: Duration = Duration::from_secs(5);
const ANSWER_BYTES_MAX: u64 = 1 << 20;
/// How long an agent that cannot shut its guest down may take to say so.
const SHUTDOWN_ERROR_LIMIT: Duration = Duration::from_secs(3);
/// How often the end of a program in the guest is asked for.
const ASK_AGAIN: Duration = Duration::from_millis(100);

/// The command and its arguments, as the agent takes them.
pub fn command_of(question: &Question) -> (&'static str, Value) {
    match question {
        Question::Ping => ("guest-ping", json!({})),
        Question::Freeze => ("guest-fsfreeze-freeze", json!({})),
        Question::Thaw => ("guest-fsfreeze-thaw", json!({})),
        Question::Frozen => ("guest-fsfreeze-status", json!({})),
        Question::Run { program, arguments } => {
            ("guest-exec", json!({ "path": program, "arg": arguments, "capture-output": true }))
        }
        Question::Shutdown => ("guest-shutdown", json!({ "mode": "powerdown" })),
    }
}

/// Asks over a connection to the agent's channel.
pub async fn ask(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    question: &Question,
    limit: Duration,
) -> Result<Value, HypervisorError> {
    let asking = async {
        let mut channel = Channel(BufReader::new(stream));
        channel.sync().await?;
        let (command, arguments) = command_of(question);
        if *question == Question::Shutdown {
            // It answers with its end, or with an error. What it did not read yet would be lost with the connection.
            channel.send(command, &arguments).await?;
            return match tokio::time::timeout(SHUTDOWN_ERROR_LIMIT, channel.answer(command)).await {
                Ok(Err(refused @ HypervisorError::Refused { .. })) => Err(refused),
                _ => Ok(Value::Null),
            };
        }
        let answer = channel.command(command, &arguments).await?;
        if !matches!(question, Question::Run { .. }) {
            return Ok(answer);
        }
        let status = json!({ "pid": answer["pid"] });
        let mut again = tokio::time::interval(ASK_AGAIN);
        loop {
            again.tick().await;
            let answer = channel.command("guest-exec-status", &status).await?;
            if answer["exited"] == true {
                return Ok(answer);
            }
        }
    };
    match tokio::time::timeout(limit, asking).await {
        Ok(answer) => answer,
        Err(_) => Err(HypervisorError::Guest { reason: format!("nothing came within {limit:?}") }),
    }
}

struct Channel<S>(BufReader<S>);

impl<S: AsyncRead + AsyncWrite + Unpin> Channel<S> {
    async fn sync(&mut self) -> Result<(), HypervisorError> {
        let number = Uuid::new_v4().as_u128() as u64 >> 12;
        let text = format!("\u{00ff}{}\n", json!({ "execute": "guest-sync-delimited", "arguments": { "id": number } }));
        // The marker is the byte 0xff, which is no UTF-8.
        let bytes: Vec<u8> = [0xff].into_iter().chain(text.bytes().skip(2)).collect();
        self.0.get_mut().write_all(&bytes).await.map_err(lost)?;
        loop {
            let mut dropped = Vec::new();
            (&mut self.0).take(ANSWER_BYTES_MAX).read_until(0xff, &mut dropped).await.map_err(lost)?;
            if dropped.last() != Some(&0xff) {
                return Err(HypervisorError::Guest { reason: "the channel was closed".to_owned() });
            }
            if self.line().await?["return"] == number {
                return Ok(());
            }
        }
    }

    async fn send(&mut self, command: &str, arguments: &Value) -> Result<(), HypervisorError> {
        let text = format!("{}\n", json!({ "execute": command, "arguments": arguments }));
        self.0.get_mut().write_all(text.as_bytes()).await.map_err(lost)
    }

    async fn command(&mut self, command: &str, arguments: &Value) -> Result<Value, HypervisorError> {
        self.send(command, arguments).await?;
        self.answer(command).await
    }

    async fn answer(&mut self, command: &str) -> Result<Value, HypervisorError> {
        let mut answer = self.line().await?;
        if let Some(error) = answer.get("error") {
            let reason = error["desc"].as_str().unwrap_or("it gave no reason").to_owned();
            return Err(HypervisorError::Refused { what: format!("{command} in the guest"), reason });
        }
        Ok(answer["return"].take())
    }

    async fn line(&mut self) -> Result<Value, HypervisorError> {
        let mut line = Vec::new();
        (&mut self.0).take(ANSWER_BYTES_MAX).read_until(b'\n', &mut line).await.map_err(lost)?;
        if line.last() != Some(&b'\n') {
            return Err(HypervisorError::Guest { reason: "its answer was cut off".to_owned() });
        }
        serde_json::from_slice(&line).map_err(|error| HypervisorError::Guest { reason: format!("no JSON: {error}") })
    }
}

fn lost(error: std::io::Error) -> HypervisorError {
    HypervisorError::Guest { reason: error.to_string() }
}

/// A guest whose file systems are held. They are let go when this is dropped, or the limit is over.
#[derive(Debug)]
pub struct Frozen {
    pub file_systems: u64,
    release: Option<oneshot::Sender<()>>,
    thawed: Option<oneshot::Receiver<Result<(), HypervisorError>>>,
}

impl Frozen {
    /// Lets the guest go. An error says that it may have been let go before: what was done under the freeze does not count.
    pub async fn thaw(mut self) -> Result<(), HypervisorError> {
        let released = self.release.take().is_some_and(|release| release.send(()).is_ok());
        let thawed = match self.thawed.take() {
            Some(thawed) => thawed.await.unwrap_or(Ok(())),
            None => Ok(()),
        };
        if !released {
            return Err(HypervisorError::TimedOut { what: "the freeze of the guest".to_owned(), limit: FREEZE_MAX });
        }
        thawed
    }
}

/// Flushes the guest's file systems and holds their writes, for `limit` at most.
pub async fn freeze(
    hypervisor: std::sync::Arc<dyn Hypervisor>,
    id: Uuid,
    limit: Duration,
) -> Result<Frozen, HypervisorError> {
    let limit = limit.min(FREEZE_MAX);
    let (release, released) = oneshot::channel();
    let (tell, thawed) = oneshot::channel();
    let (frozen, begun) = oneshot::channel();
    // A task of its own: a caller that is dropped while the guest freezes leaves no frozen guest.
    tokio::spawn(async move {
        let deadline = tokio::time::Instant::now() + limit;
        let answer = hypervisor.ask_guest(id, Question::Freeze, limit).await;
        let failed = answer.is_err();
        let heard = frozen.send(answer.map(|count| count.as_u64().unwrap_or_default())).is_ok();
        if heard && !failed {
            // Ends with a word, with the handle, or with the limit.
            let _ = tokio::time::timeout_at(deadline, released).await;
        }
        let outcome = hypervisor.ask_guest(id, Question::Thaw, THAW_LIMIT).await.map(drop);
        if let Err(error) = &outcome
            && !failed
        {
            tracing::error!(machine = %id, %error, "a guest that was frozen does not say that it was let go");
        }
        let _ = tell.send(outcome);
    });
    let lost = || HypervisorError::Guest { reason: "the freeze was given up".to_owned() };
    let file_systems = begun.await.map_err(|_| lost())??;
    Ok(Frozen { file_systems, release: Some(release), thawed: Some(thawed) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::DuplexStream;

    /// An agent that answers by `answer`, after noise of an earlier question.
    async fn agent(stream: DuplexStream, mut answer: impl FnMut(&Value) -> Option<Value>) {
        let mut stream = BufReader::new(stream);
        stream.get_mut().write_all(b"{\"return\": 99}\n").await.unwrap();
        loop {
            let mut line = Vec::new();
            if stream.read_until(b'\n', &mut line).await.unwrap() == 0 {
                return;
            }
            let delimited = line.first() == Some(&0xff);
            let question: Value = serde_json::from_slice(&line[usize::from(delimited)..]).unwrap();
            let reply = match question["execute"] == "guest-sync-delimited" {
                true => Some(json!({ "return": question["arguments"]["id"] })),
                false => answer(&question),
            };
            let Some(reply) = reply else { continue };
            let mark: &[u8] = if delimited { &[0xff] } else { &[] };
            let text = [mark, reply.to_string().as_bytes(), b"\n"].concat();
            stream.get_mut().write_all(&text).await.unwrap();
        }
    }

    #[tokio::test]
    async fn an_agent_is_asked_past_what_is_left_of_before() {
        let (ours, theirs) = tokio::io::duplex(4096);
        tokio::spawn(agent(theirs, |_| Some(json!({ "return": {} }))));
        assert_eq!(ask(ours, &Question::Ping, Duration::from_secs(5)).await.unwrap(), json!({}));
    }

    #[tokio::test]
    async fn a_shutdown_is_read_to_its_end_before_the_connection_goes_and_its_refusal_is_heard() {
        let (ours, theirs) = tokio::io::duplex(16);
        let (tell, told) = oneshot::channel();
        let mut tell = Some(tell);
        // It reads a little at a time, and ends.
        tokio::spawn(agent(theirs, move |question| {
            assert_eq!(question["execute"], "guest-shutdown");
            tell.take().map(|tell| tell.send(())).and(None)
        }));
        ask(ours, &Question::Shutdown, Duration::from_secs(60)).await.unwrap();
        told.await.unwrap();
        let (ours, theirs) = tokio::io::duplex(4096);
        tokio::spawn(agent(theirs, |_| Some(json!({ "error": { "desc": "not allowed" } }))));
        let refused = ask(ours, &Question::Shutdown, Duration::from_secs(60)).await.unwrap_err();
        assert!(refused.to_string().contains("not allowed"), "{refused}");
    }

    #[tokio::test]
    async fn a_program_is_waited_for() {
        let (ours, theirs) = tokio::io::duplex(4096);
        let mut asked = 0;
        tokio::spawn(agent(theirs, move |question| {
            asked += 1;
            Some(match question["execute"].as_str().unwrap() {
                "guest-exec" => json!({ "return": { "pid": 7 } }),
                _ => json!({ "return": { "exited": asked > 3, "exitcode": 3, "pid": question["arguments"]["pid"] } }),
            })
        }));
        let question = Question::Run { program: "/bin/true".into(), arguments: vec![] };
        let answer = ask(ours, &question, Duration::from_secs(5)).await.unwrap();
        assert_eq!((answer["exitcode"].as_u64(), answer["pid"].as_u64()), (Some(3), Some(7)));
    }

    #[tokio::test]
    async fn an_agent_that_refuses_or_is_silent_is_named() {
        let (ours, theirs) = tokio::io::duplex(4096);
        tokio::spawn(agent(theirs, |_| Some(json!({ "error": { "desc": "frozen already" } }))));
        let refused = ask(ours, &Question::Freeze, Duration::from_secs(5)).await.unwrap_err();
        assert!(refused.to_string().contains("frozen already"), "{refused}");
        let (ours, theirs) = tokio::io::duplex(4096);
        tokio::spawn(agent(theirs, |_| None));
        let silent = ask(ours, &Question::Ping, Duration::from_millis(100)).await.unwrap_err();
        assert!(matches!(silent, HypervisorError::Guest { .. }), "{silent}");
    }
}
