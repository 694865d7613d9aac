//! What a parser says of input that is not as expected, in words for people. Parsers of serde name types of the program
//! (`u64`, `struct PlanStep`) and places in the text; people know fields and what may be in them.

/// Words of a list that are shown.
const LISTED_MAX: usize = 16;
/// Of what was given.
const SHOWN_CHARS: usize = 80;

/// `path` is where it is: `steps[0].action`; `.` or nothing for the whole. `text` is what serde said.
pub fn in_words(path: &str, text: &str) -> String {
    let (text, place) = without_place(text);
    let path = path.trim_start_matches('.');
    let it = if path.is_empty() { "it".to_owned() } else { format!("`{}`", cut(path)) };
    if let Some(field) = within(text, "missing field `") {
        return format!("`{}` is missing", cut(&joined(path, field)));
    }
    if let Some(field) = within(text, "duplicate field `") {
        return format!("`{}` is there twice", cut(&joined(path, field)));
    }
    if let Some(field) = within(text, "unknown field `") {
        let known = words(text);
        let of = if known.is_empty() { "nothing is".to_owned() } else { format!("known: {}", known.join(", ")) };
        return format!("`{}` is not known there; {of}", cut(&joined(path, field)));
    }
    if let Some(given) = within(text, "unknown variant `") {
        return format!("{it} cannot be {:?}; it can be {}", cut(given), words(text).join(", "));
    }
    if let Some((given, expected)) = parted(text, "invalid type: ") {
        return format!("{it} is {}, and must be {}", given_in_words(given), expected_in_words(expected));
    }
    if let Some((given, expected)) = parted(text, "invalid value: ") {
        return format!("{it} cannot be {}; it must be {}", given_in_words(given), expected_in_words(expected));
    }
    if let Some((length, expected)) = parted(text, "invalid length ") {
        if expected.starts_with("struct ") {
            return format!("{it} is a list, and must be an object");
        }
        return format!("{it} has {length} parts, and must be {}", expected_in_words(expected));
    }
    if text.starts_with("data did not match any variant of untagged enum") {
        return format!("{it} has none of the forms that it can have");
    }
    let must_be = match text {
        "invalid digit found in string" | "cannot parse integer from empty string" => "a whole number, 0 or more",
        "number too large to fit in target type" => "a smaller number",
        "provided string was not `true` or `false`" => "true or false",
        _ => {
            let place = place.map_or(String::new(), |(line, column)| format!("line {line}, column {column}: "));
            let of = if path.is_empty() { String::new() } else { format!("{it}: ") };
            return format!("{place}{of}{}", cut(text));
        }
    };
    format!("{it} must be {must_be}")
}

/// Without ` at line 1 column 7`, which is told apart.
fn without_place(text: &str) -> (&str, Option<(u64, u64)>) {
    let text = text.trim_end();
    let parted = text.rsplit_once(" at line ").and_then(|(text, place)| {
        let (line, column) = place.split_once(" column ")?;
        Some((text, (line.parse().ok()?, column.parse().ok()?)))
    });
    parted.map_or((text, None), |(text, place)| (text, Some(place)))
}

/// What stands between backquotes after `before`.
fn within<'a>(text: &'a str, before: &str) -> Option<&'a str> {
    text.strip_prefix(before)?.split_once('`').map(|(within, _)| within)
}

/// A field of what is at `path`, where that does not name it already.
fn joined(path: &str, field: &str) -> String {
    let is_named = path == field || path.strip_suffix(field).is_some_and(|before| before.ends_with('.'));
    match path {
        "" => field.to_owned(),
        _ if is_named => path.to_owned(),
        _ => format!("{path}.{field}"),
    }
}

/// Those that are expected: in backquotes, behind the word.
fn words(text: &str) -> Vec<String> {
    let listed = text.split_once("expected ").map_or("", |(_, listed)| listed);
    let all: Vec<&str> = listed.split('`').skip(1).step_by(2).collect();
    let mut shown: Vec<String> = all.iter().take(LISTED_MAX).map(|word| (*word).to_owned()).collect();
    if all.len() > LISTED_MAX {
        shown.push(format!("and {} more", all.len() - LISTED_MAX));
    }
    shown
}

fn parted<'a>(text: &'a str, before: &str) -> Option<(&'a str, &'a str)> {
    text.strip_prefix(before)?.rsplit_once(", expected ")
}

fn given_in_words(given: &str) -> String {
    let quoted = |kind: &str| given.strip_prefix(kind).map(|rest| cut(rest.trim_matches('`')));
    match given {
        "map" => "an object".to_owned(),
        "sequence" => "a list".to_owned(),
        "null" | "unit value" => "null".to_owned(),
        _ => quoted("string ")
            .map(|text| format!("the text {text}"))
            .or_else(|| quoted("integer ").or_else(|| quoted("floating point ")).map(|of| format!("the number {of}")))
            .or_else(|| quoted("boolean "))
            .unwrap_or_else(|| cut(given)),
    }
}

fn expected_in_words(expected: &str) -> String {
    let words = match expected {
        "u8" | "u16" | "u32" | "u64" | "usize" => "a whole number, 0 or more",
        "i8" | "i16" | "i32" | "i64" => "a whole number",
        "f32" | "f64" => "a number",
        "a string" | "a borrowed string" | "string" => "text",
        "a boolean" => "true or false",
        "a sequence" => "a list",
        "a map" => "an object",
        "string or map" => "a word, or an object with one field",
        _ if expected.starts_with("struct ") => "an object",
        _ if expected.starts_with("tuple ") => "a list",
        _ if expected.contains("enum ") => "one of the words or objects that it can be",
        _ => return cut(expected),
    };
    words.to_owned()
}

fn cut(text: &str) -> String {
    match text.chars().count() > SHOWN_CHARS {
        true => text.chars().take(SHOWN_CHARS).chain(['…']).collect(),
        false => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::in_words;

    #[test]
    fn what_parsers_say_is_said_in_plain_words() {
        for (path, said, words) in [
            (".", "missing field `name` at line 1 column 2", "`name` is missing"),
            ("steps[0]", "missing field `action` at line 3 column 7", "`steps[0].action` is missing"),
            (
                "x",
                "unknown field `x`, expected one of `a`, `b` at line 1 column 4",
                "`x` is not known there; known: a, b",
            ),
            ("a.x", "unknown field `x`, expected `a`", "`a.x` is not known there; known: a"),
            ("", "unknown field `x`, there are no fields", "`x` is not known there; nothing is"),
            (
                "role",
                "unknown variant `king`, expected `reader` or `operator`",
                "`role` cannot be \"king\"; it can be reader, operator",
            ),
            (
                ".",
                "invalid type: sequence, expected struct ProtectRequest at line 1 column 0",
                "it is a list, and must be an object",
            ),
            (
                "n",
                "invalid type: string \"x, expected y\", expected u64",
                "`n` is the text \"x, expected y\", and must be a whole number, 0 or more",
            ),
            (
                "n",
                "invalid value: integer `-1`, expected u64 at line 1 column 9",
                "`n` cannot be the number -1; it must be a whole number, 0 or more",
            ),
            ("n", "invalid type: null, expected a string", "`n` is null, and must be text"),
            ("n", "invalid type: boolean `true`, expected a sequence", "`n` is true, and must be a list"),
            (
                "c",
                "data did not match any variant of untagged enum Compression",
                "`c` has none of the forms that it can have",
            ),
            ("after", "invalid digit found in string", "`after` must be a whole number, 0 or more"),
            (".", "invalid length 0, expected struct UserBody with 2 elements", "it is a list, and must be an object"),
            (".", "EOF while parsing an object at line 1 column 1", "line 1, column 1: EOF while parsing an object"),
            ("t", "no time of RFC 3339", "`t`: no time of RFC 3339"),
        ] {
            assert_eq!(in_words(path, said), words);
        }
        let long = format!("unknown variant `{}`, expected `a`", "x".repeat(10_000));
        assert!(in_words("role", &long).chars().count() < 200);
        let many: Vec<String> = (0..100).map(|number| format!("`w{number}`")).collect();
        assert!(
            in_words("x", &format!("unknown field `x`, expected one of {}", many.join(", "))).ends_with("and 84 more")
        );
    }
}
