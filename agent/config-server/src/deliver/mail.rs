//! An event as a mail, over SMTP (RFC 5321) with STARTTLS (RFC 3207) or TLS from the first byte, and AUTH PLAIN (RFC 4616).
//! Only what handing in one text to one server needs: no crate for it does TLS 1.3 alone, and all bring a TLS of their own.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use tidemark_base::error::with_causes;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;

use super::{Mail, MailTls, webhook};
use crate::history::{AlertState, Stored};

/// A reply of a server: some lines of at most 512 bytes each.
const REPLY_BYTES_MAX: u64 = 64 << 10;
const ADDRESS_BYTES_MAX: usize = 254;
/// Lines of a body, so that no server refuses one as too long.
const LINE_CHARS: usize = 200;

fn server(mail: &Mail) -> Result<(&str, u16), String> {
    let shown: String = mail.server.chars().take(120).collect();
    let wrong = || format!("{shown:?} is no address of a mail server");
    let (host, port) = mail.server.rsplit_once(':').ok_or_else(wrong)?;
    let host = host.trim_matches(['[', ']']);
    if host.is_empty() || host.len() > 253 || host.contains(|letter: char| letter.is_whitespace() || letter == '/') {
        return Err(wrong());
    }
    Ok((host, port.parse().map_err(|_| wrong())?))
}

/// Plain ones only: what could end a command is none.
fn is_address(text: &str) -> bool {
    let is_plain = text.bytes().all(|byte| byte.is_ascii_graphic() && !b"<>()[],;:\\\"".contains(&byte));
    let parts =
        text.split_once('@').is_some_and(|(name, host)| !name.is_empty() && !host.is_empty() && !host.contains('@'));
    is_plain && parts && text.len() <= ADDRESS_BYTES_MAX
}

pub fn check(mail: &Mail) -> Result<(), String> {
    let (host, _) = server(mail)?;
    if mail.tls == MailTls::None && !webhook::is_here(host) {
        return Err(format!("mail to {host} would not be encrypted, and it is not this machine"));
    }
    match mail.to.iter().chain([&mail.from]).find(|text| !is_address(text)) {
        Some(wrong) => Err(format!("{:?} is no address of a mailbox", wrong.chars().take(120).collect::<String>())),
        None => Ok(()),
    }
}

/// A mailbox that the server did not take, although it took the message for others.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Refused {
    pub to: String,
    reason: String,
    /// Asking again changes nothing.
    pub is_final: bool,
}

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the mail server refused {}: {}", self.to, self.reason)
    }
}

/// Hands the message in for these of its recipients; `Err` when it was taken for none.
pub async fn send(mail: &Mail, to: &[String], event: &Stored) -> Result<Vec<Refused>, String> {
    let (host, port) = server(mail)?;
    let stream = TcpStream::connect((host, port)).await.map_err(|error| with_causes(&error))?;
    match mail.tls {
        MailTls::None => {
            let mut session = Session::new(stream);
            session.greeting().await?;
            session.hello().await?;
            session.hand_in(mail, to, event).await
        }
        MailTls::Tls => {
            let mut session = Session::new(webhook::encrypt(stream, host, mail.ca.as_ref()).await?);
            session.greeting().await?;
            session.hello().await?;
            session.hand_in(mail, to, event).await
        }
        MailTls::Starttls => {
            let mut plain = Session::new(stream);
            plain.greeting().await?;
            if !plain.hello().await?.iter().any(|line| line.eq_ignore_ascii_case("STARTTLS")) {
                return Err(format!("the mail server {host} offers no STARTTLS, and nothing is sent without it"));
            }
            plain.command("STARTTLS", 220).await?;
            // Whatever came behind the answer was not encrypted, and is not listened to.
            let stream = plain.into_stream()?;
            let mut session = Session::new(webhook::encrypt(stream, host, mail.ca.as_ref()).await?);
            session.hello().await?;
            session.hand_in(mail, to, event).await
        }
    }
}

struct Session<S>(BufReader<S>);

impl<S: AsyncRead + AsyncWrite + Unpin> Session<S> {
    fn new(stream: S) -> Self {
        Self(BufReader::new(stream))
    }

    fn into_stream(self) -> Result<S, String> {
        match self.0.buffer().is_empty() {
            true => Ok(self.0.into_inner()),
            false => Err("the mail server said more than STARTTLS allows".to_owned()),
        }
    }

    async fn greeting(&mut self) -> Result<(), String> {
        self.reply(220, "greeting").await.map(drop)
    }

    /// What it offers.
    async fn hello(&mut self) -> Result<Vec<String>, String> {
        self.command("EHLO tidemark", 250).await
    }

    async fn hand_in(&mut self, mail: &Mail, to: &[String], event: &Stored) -> Result<Vec<Refused>, String> {
        if let (Some(user), Some(password)) = (&mail.user, &mail.password) {
            let shown = STANDARD.encode(format!("\0{user}\0{password}"));
            self.write(&format!("AUTH PLAIN {shown}\r\n")).await?;
            self.reply(235, "AUTH PLAIN").await?;
        }
        self.command(&format!("MAIL FROM:<{}>", mail.from), 250).await?;
        let mut refused = Vec::new();
        for to in to {
            self.write(&format!("RCPT TO:<{to}>\r\n")).await?;
            let (code, lines) = self.answer().await?;
            // 251: it forwards it.
            if ![250, 251].contains(&code) {
                let reason = format!("{code} {}", lines.join(" "));
                refused.push(Refused { to: to.clone(), reason, is_final: code >= 500 });
            }
        }
        if let Some(first) = refused.first().filter(|_| refused.len() == to.len()) {
            return Err(first.to_string());
        }
        self.command("DATA", 354).await?;
        self.write(&message(mail, event)).await?;
        self.reply(250, "the message").await?;
        // It has the message; how it takes the good-bye does not matter.
        let _ = self.command("QUIT", 221).await;
        Ok(refused)
    }

    async fn command(&mut self, command: &str, expected: u16) -> Result<Vec<String>, String> {
        self.write(&format!("{command}\r\n")).await?;
        self.reply(expected, command).await
    }

    async fn write(&mut self, text: &str) -> Result<(), String> {
        self.0.write_all(text.as_bytes()).await.map_err(|error| with_causes(&error))?;
        self.0.flush().await.map_err(|error| with_causes(&error))
    }

    /// The text of each line of a reply that must be this one.
    async fn reply(&mut self, expected: u16, to: &str) -> Result<Vec<String>, String> {
        match self.answer().await? {
            (code, lines) if code == expected => Ok(lines),
            (code, lines) => Err(format!("the mail server answered {to:?} with {code} {}", lines.join(" "))),
        }
    }

    async fn answer(&mut self) -> Result<(u16, Vec<String>), String> {
        let mut lines = Vec::new();
        let mut limited = (&mut self.0).take(REPLY_BYTES_MAX);
        loop {
            let mut line = Vec::new();
            limited.read_until(b'\n', &mut line).await.map_err(|error| with_causes(&error))?;
            let line = String::from_utf8_lossy(&line).trim_end().to_owned();
            let (Some(code), rest) = (line.get(..3).and_then(|code| code.parse::<u16>().ok()), line.get(4..)) else {
                return Err("the mail server gave an answer that makes no sense".to_owned());
            };
            lines.push(rest.unwrap_or_default().to_owned());
            if line.as_bytes().get(3) != Some(&b'-') {
                return Ok((code, lines));
            }
        }
    }
}

/// The texts are ours and of hosts: each is one line, and none ends the message.
fn line(text: &str) -> String {
    text.chars().map(|letter| if letter.is_control() { ' ' } else { letter }).take(LINE_CHARS).collect()
}

fn message(mail: &Mail, event: &Stored) -> String {
    let of = event.machine.as_ref().map_or(String::new(), |machine| format!(" {machine}:"));
    let subject = line(&format!("[tidemark {}]{of} {}", event.severity, event.message));
    let mut body = format!("{}\n\n", event.message);
    let alert = event.alert.as_ref();
    let state = alert.map(|alert| match alert.state {
        AlertState::Raised => "raised",
        AlertState::Cleared => "cleared",
    });
    for (name, text) in [
        ("help", event.help.as_str()),
        ("machine", event.machine.as_deref().unwrap_or_default()),
        ("time", &event.time.to_string()),
        ("severity", alert.map_or(&event.severity, |alert| &alert.severity)),
        ("source", &event.source),
        ("alert", alert.map_or("", |alert| &alert.id)),
        ("state", state.unwrap_or_default()),
        ("since", &alert.map_or_else(String::new, |alert| alert.since.to_string())),
        ("event", &event.id.to_string()),
    ] {
        if !text.is_empty() {
            body.push_str(&format!("{name}: {text}\n"));
        }
    }
    // In base64 no line is too long, and none begins with a dot.
    let encoded = STANDARD.encode(body);
    let lines: Vec<&str> = encoded.as_bytes().chunks(76).filter_map(|line| std::str::from_utf8(line).ok()).collect();
    format!(
        "From: Tidemark <{}>\r\nTo: {}\r\nSubject: =?utf-8?B?{}?=\r\nDate: {}\r\nMessage-ID: <{}@tidemark>\r\n\
         Auto-Submitted: auto-generated\r\nMIME-Version: 1.0\r\nContent-Type: text/plain; charset=utf-8\r\n\
         Content-Transfer-Encoding: base64\r\n\r\n{}\r\n.\r\n",
        mail.from,
        mail.to.join(", "),
        STANDARD.encode(subject),
        date(event.time.0 / 1_000_000_000),
        uuid::Uuid::new_v4(),
        lines.join("\r\n"),
    )
}

/// As RFC 5322 writes it: `Sun, 22 Nov 2026 05:12:55 +0000`.
fn date(seconds: u64) -> String {
    const DAYS: [&str; 7] = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"];
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    // `2026-11-22T05:12:55…`
    let text = tidemark_base::Timestamp(seconds * 1_000_000_000).to_string();
    let part = |from: usize, to: usize| text.get(from..to).unwrap_or_default();
    let month = part(5, 7).parse::<usize>().unwrap_or(1).clamp(1, 12);
    let day = DAYS[(seconds / 86_400 % 7) as usize];
    format!("{day}, {} {} {} {} +0000", part(8, 10), MONTHS[month - 1], part(0, 4), part(11, 19))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A mail server that takes one mailbox, never another, and a third one later.
    #[tokio::test]
    async fn one_mailbox_that_is_refused_holds_up_no_other() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = listener.local_addr().unwrap().to_string();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let mut stream = BufReader::new(stream);
                let mut answer = "220 here";
                loop {
                    stream.write_all(format!("{answer}\r\n").as_bytes()).await.unwrap();
                    let mut line = String::new();
                    if stream.read_line(&mut line).await.unwrap() == 0 {
                        break;
                    }
                    answer = match line.trim_end() {
                        "RCPT TO:<never@y.example>" => "550 no such mailbox",
                        "RCPT TO:<later@y.example>" => "451 busy",
                        "DATA" => "354 go",
                        "QUIT" => "221 bye",
                        _ if line == ".\r\n" || line.starts_with("RCPT") || line.starts_with("MAIL") => "250 ok",
                        _ if line.starts_with("EHLO") => "250 here",
                        // The message, of which only the end is answered.
                        _ => loop {
                            let mut line = String::new();
                            stream.read_line(&mut line).await.unwrap();
                            if line == ".\r\n" {
                                break "250 taken";
                            }
                        },
                    };
                }
            }
        });
        let to = |names: &[&str]| names.iter().map(|name| format!("{name}@y.example")).collect::<Vec<_>>();
        let mail = Mail {
            server,
            tls: MailTls::None,
            user: None,
            password: None,
            from: "t@x.example".to_owned(),
            to: to(&["never", "good", "later"]),
            ca: None,
        };
        let event = Stored {
            id: 1,
            time: tidemark_base::Timestamp(1),
            severity: "warning".to_owned(),
            source: String::new(),
            machine: None,
            disk: None,
            kind: "alert_raised".to_owned(),
            message: "what happened".to_owned(),
            help: String::new(),
            epoch: 1,
            actor: None,
            alert: None,
        };
        let refused = send(&mail, &mail.to, &event).await.unwrap();
        let told: Vec<_> = refused.iter().map(|refused| (refused.to.as_str(), refused.is_final)).collect();
        assert_eq!(told, [("never@y.example", true), ("later@y.example", false)]);
        let nobody = send(&mail, &to(&["never", "later"]), &event).await.unwrap_err();
        assert!(nobody.contains("never@y.example") && nobody.contains("550"), "{nobody}");
    }

    #[test]
    fn a_mail_says_which_alert_it_is_about() {
        let mail = Mail {
            server: "x:25".to_owned(),
            tls: MailTls::None,
            user: None,
            password: None,
            from: "t@x.example".to_owned(),
            to: vec!["a@y.example".to_owned()],
            ca: None,
        };
        let event = Stored {
            id: 7,
            time: tidemark_base::Timestamp(5_000_000_000),
            severity: "info".to_owned(),
            source: "configuration server".to_owned(),
            machine: None,
            disk: None,
            kind: "alert_cleared".to_owned(),
            message: "no more: it burns".to_owned(),
            help: String::new(),
            epoch: 1,
            actor: None,
            alert: Some(crate::history::AlertNote {
                id: "peer/1/absence".to_owned(),
                kind: "no_contact".to_owned(),
                state: AlertState::Cleared,
                severity: "critical".to_owned(),
                since: tidemark_base::Timestamp(3_000_000_000),
            }),
        };
        let text = message(&mail, &event);
        let body = text.split_once("\r\n\r\n").unwrap().1.trim_end_matches(".\r\n").replace("\r\n", "");
        let body = String::from_utf8(STANDARD.decode(body).unwrap()).unwrap();
        for line in
            ["severity: critical", "alert: peer/1/absence", "state: cleared", "since: 1970-01-01T00:00:03", "event: 7"]
        {
            assert!(body.lines().any(|told| told.starts_with(line)), "{line}: {body}");
        }
    }

    #[test]
    fn dates_are_written_as_mail_does() {
        assert_eq!(date(1_795_324_375), "Sun, 22 Nov 2026 05:12:55 +0000");
        assert_eq!(date(0), "Thu, 01 Jan 1970 00:00:00 +0000");
    }

    #[test]
    fn addresses_that_would_end_a_command_are_none() {
        for good in ["ops@example.org", "a.b+c@x"] {
            assert!(is_address(good), "{good}");
        }
        for wrong in [
            "",
            "ops",
            "@x",
            "a@",
            "a@b@c",
            "a b@x",
            "a@x>\r\nRCPT TO:<b@y",
            "a@x,b@y",
            "ä@x",
            &format!("{}@x", "a".repeat(300)),
        ] {
            assert!(!is_address(wrong), "{wrong}");
        }
    }
}
