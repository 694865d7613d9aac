//! Questions are read by looking for tags, which is enough for those that a test asks; answers are written as VMware's servers write them.

pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn unescape(text: &str) -> String {
    text.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", "\"").replace("&amp;", "&")
}

/// The texts of all elements of this name.
pub fn all(text: &str, name: &str) -> Vec<String> {
    let (open, close) = (format!("<{name}"), format!("</{name}>"));
    let mut found = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find(&open) {
        rest = &rest[at + open.len()..];
        // A longer name.
        if !rest.starts_with(['>', ' ']) {
            continue;
        }
        let Some(begin) = rest.find('>') else { break };
        let Some(end) = rest.find(&close) else { break };
        if begin < end {
            found.push(unescape(&rest[begin + 1..end]));
        }
        rest = &rest[end..];
    }
    found
}

pub fn first(text: &str, name: &str) -> String {
    all(text, name).into_iter().next().unwrap_or_default()
}

/// The `type` of the first element of this name.
pub fn kind(text: &str, name: &str) -> String {
    let tag = text.split(&format!("<{name} ")).nth(1).and_then(|rest| rest.split('>').next()).unwrap_or_default();
    tag.split("type=\"").nth(1).and_then(|rest| rest.split('"').next()).unwrap_or_default().to_owned()
}

/// The name of the method that is called.
pub fn method(text: &str) -> String {
    let body = text.split("Body>").nth(1).unwrap_or_default();
    let name: String = body.trim_start().chars().skip(1).take_while(|character| !" >/".contains(*character)).collect();
    name
}

fn envelope(inner: &str) -> String {
    format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<soapenv:Envelope xmlns:soapenc=\"http://schemas.xmlsoap.org/soap/encoding/\"\n \
         xmlns:soapenv=\"http://schemas.xmlsoap.org/soap/envelope/\"\n xmlns:xsd=\"http://www.w3.org/2001/XMLSchema\"\n \
         xmlns:xsi=\"http://www.w3.org/2001/XMLSchema-instance\">\n<soapenv:Body>\n{inner}\n</soapenv:Body>\n</soapenv:Envelope>"
    )
}

pub fn answer(method: &str, inner: &str) -> String {
    envelope(&format!("<{method}Response xmlns=\"urn:vim25\">{inner}</{method}Response>"))
}

pub fn fault(kind: &str, message: &str) -> String {
    let tag = format!("{kind}Fault");
    envelope(&format!(
        "<soapenv:Fault><faultcode>ServerFaultCode</faultcode><faultstring>{}</faultstring><detail><{tag} xmlns=\"urn:vim25\" \
         xsi:type=\"{kind}\"></{tag}></detail></soapenv:Fault>",
        escape(message)
    ))
}

pub fn property(name: &str, kind: &str, value: &str) -> String {
    format!("<propSet><name>{name}</name><val xsi:type=\"{kind}\">{value}</val></propSet>")
}

pub fn reference(name: &str, kind: &str, value: &str) -> String {
    format!(
        "<propSet><name>{name}</name><val type=\"{kind}\" xsi:type=\"ManagedObjectReference\">{value}</val></propSet>"
    )
}
