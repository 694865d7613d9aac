//! Questions to the vSphere API as XML, and its answers: the few methods that we need, after VMware's public description of `vim25`. `vim_rs`, the one kept crate
//! with its types, speaks the JSON of vCenter 8.0 U1 and later, and neither older ones nor an ESXi host alone.

use roxmltree::{Document, Node};

use crate::error::VsphereError;

/// A managed object: what kind, and which.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Reference {
    pub kind: String,
    pub value: String,
}

impl Reference {
    pub fn new(kind: &str, value: &str) -> Self {
        Self { kind: kind.to_owned(), value: value.to_owned() }
    }

    pub fn of(node: Node<'_, '_>) -> Self {
        Self::new(node.attribute("type").unwrap_or_default(), text(node))
    }

    pub fn argument(&self, name: &str) -> String {
        format!("<{name} type=\"{}\">{}</{name}>", escape(&self.kind), escape(&self.value))
    }
}

pub fn argument(name: &str, value: &str) -> String {
    format!("<{name}>{}</{name}>", escape(value))
}

pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            other => escaped.push(other),
        }
    }
    escaped
}

pub fn envelope(method: &str, this: &Reference, arguments: &str) -> String {
    let this = this.argument("_this");
    format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\
         <soapenv:Envelope xmlns:soapenv=\"http://schemas.xmlsoap.org/soap/envelope/\" \
         xmlns:xsd=\"http://www.w3.org/2001/XMLSchema\" xmlns:xsi=\"http://www.w3.org/2001/XMLSchema-instance\">\
         <soapenv:Body><{method} xmlns=\"urn:vim25\">{this}{arguments}</{method}></soapenv:Body></soapenv:Envelope>"
    )
}

pub fn child<'a, 'b>(node: Node<'a, 'b>, name: &str) -> Option<Node<'a, 'b>> {
    node.children().find(|child| child.tag_name().name() == name)
}

pub fn children<'a, 'b: 'a>(node: Node<'a, 'b>, name: &'a str) -> impl Iterator<Item = Node<'a, 'b>> {
    node.children().filter(move |child| child.tag_name().name() == name)
}

pub fn text<'a>(node: Node<'a, '_>) -> &'a str {
    node.text().unwrap_or_default().trim()
}

pub fn child_text<'a>(node: Node<'a, '_>, name: &str) -> Option<&'a str> {
    child(node, name).map(text)
}

/// The `xsi:type` of an element, without the prefix of its name space.
pub fn type_of<'a>(node: Node<'a, '_>) -> &'a str {
    let named = node.attribute(("http://www.w3.org/2001/XMLSchema-instance", "type")).unwrap_or_default();
    named.rsplit(':').next().unwrap_or(named)
}

/// A fault as `detail` of an answer, or an error of a task, tells it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Fault {
    pub kind: String,
    pub message: String,
}

impl Fault {
    pub fn refused(self, what: &str) -> VsphereError {
        VsphereError::Fault { what: what.to_owned(), fault: self.kind, message: self.message }
    }
}

/// What the method returned. `use_it` gets the element around the return values.
pub fn answer<T>(
    what: &str,
    body: &[u8],
    use_it: impl FnOnce(Node<'_, '_>) -> Result<T, VsphereError>,
) -> Result<Result<T, Fault>, VsphereError> {
    let wrong = |reason: String| VsphereError::Answer { what: what.to_owned(), reason };
    let text_of = std::str::from_utf8(body).map_err(|error| wrong(error.to_string()))?;
    let document = Document::parse(text_of).map_err(|error| wrong(error.to_string()))?;
    let inner = child(document.root_element(), "Body").and_then(|body| body.first_element_child());
    let inner = inner.ok_or_else(|| wrong("it has no body".to_owned()))?;
    if inner.tag_name().name() != "Fault" {
        let is_ours = inner.tag_name().name().strip_suffix("Response") == Some(what);
        return if is_ours { use_it(inner).map(Ok) } else { Err(wrong("it answers something else".to_owned())) };
    }
    let detail = child(inner, "detail").and_then(|detail| detail.first_element_child());
    let named = detail.map(|detail| match type_of(detail) {
        "" => detail.tag_name().name(),
        named => named,
    });
    let kind = named.unwrap_or("Fault");
    let kind = kind.strip_suffix("Fault").filter(|kind| !kind.is_empty() && *kind != "File").unwrap_or(kind);
    let message = child_text(inner, "faultstring").unwrap_or_default();
    Ok(Err(Fault { kind: kind.to_owned(), message: message.to_owned() }))
}

/// Of a task that failed.
pub fn task_fault(error: Node<'_, '_>) -> Fault {
    let kind = child(error, "fault").map(type_of).unwrap_or("Fault");
    Fault { kind: kind.to_owned(), message: child_text(error, "localizedMessage").unwrap_or_default().to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault_of(detail: &str) -> Fault {
        let text = format!(
            "<e:Envelope xmlns:e=\"http://schemas.xmlsoap.org/soap/envelope/\" xmlns:xsi=\"http://www.w3.org/2001/XMLSchema-instance\"><e:Body><e:Fault>\
             <faultcode>ServerFaultCode</faultcode><faultstring>why</faultstring><detail>{detail}</detail></e:Fault></e:Body></e:Envelope>"
        );
        answer("Login", text.as_bytes(), |_| Ok(())).unwrap().unwrap_err()
    }

    #[test]
    fn faults_are_named_however_they_are_told() {
        for (detail, kind) in [
            ("<NotAuthenticatedFault xmlns=\"urn:vim25\" xsi:type=\"NotAuthenticated\"/>", "NotAuthenticated"),
            ("<InvalidLoginFault/>", "InvalidLogin"),
            ("<FileFaultFault xsi:type=\"FileFault\"/>", "FileFault"),
            ("<FileFaultFault/>", "FileFault"),
            ("", "Fault"),
        ] {
            assert_eq!(fault_of(detail), Fault { kind: kind.into(), message: "why".into() }, "{detail}");
        }
    }

    #[test]
    fn what_is_no_answer_to_the_question_is_refused() {
        for text in [
            "",
            "<html><body>503</body></html>",
            "<!DOCTYPE x [<!ENTITY a \"b\">]><Envelope><Body><LoginResponse>&a;</LoginResponse></Body></Envelope>",
            "<Envelope><Body/></Envelope>",
            "<Envelope><Body><LogoutResponse/></Body></Envelope>",
        ] {
            assert!(answer("Login", text.as_bytes(), |_| Ok(())).is_err(), "{text}");
        }
    }

    #[test]
    fn names_of_machines_cannot_leave_their_place() {
        let this = Reference::new("SearchIndex", "a\"><b>");
        let text = envelope("FindByInventoryPath", &this, &argument("inventoryPath", "</x>&<y a=\"1\">"));
        let document = Document::parse(&text).unwrap();
        let method = child(document.root_element(), "Body").unwrap().first_element_child().unwrap();
        assert_eq!(method.children().count(), 2);
        assert_eq!(child_text(method, "inventoryPath"), Some("</x>&<y a=\"1\">"));
        assert_eq!(child_text(method, "_this"), Some("a\"><b>"));
    }
}
