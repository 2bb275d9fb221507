//! `$filter`: conjunctions of `field eq 'value'` and of `function()`. Anything else is refused, never ignored: answering more
//! than was asked for makes clients act on the wrong object.

use crate::error::{Answer, Fault};

/// One term.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Term {
    /// Value compared without regard to case.
    Eq { field: String, value: String },
    /// `atScope()`
    Call { name: String },
}

/// Parses a filter; empty gives no terms.
pub fn parse(text: &str) -> Answer<Vec<Term>> {
    let bad = || {
        let message =
            format!("The filter \"{text}\" is not served. Served are: field eq 'value', function(), joined by 'and'.");
        Fault::bad_request("InvalidFilterInQueryString", message)
    };
    let mut out = Vec::new();
    let mut rest = text.trim();
    while !rest.is_empty() {
        let end = rest.find(|c: char| c.is_whitespace() || c == '(').ok_or_else(bad)?;
        let word = rest[..end].to_owned();
        rest = rest[end..].trim_start();
        if let Some(after) = rest.strip_prefix("()") {
            out.push(Term::Call { name: word });
            rest = after.trim_start();
        } else {
            rest = keyword(rest, "eq").ok_or_else(bad)?;
            let (value, after) = quoted(rest).ok_or_else(bad)?;
            out.push(Term::Eq { field: word, value });
            rest = after.trim_start();
        }
        if !rest.is_empty() {
            rest = keyword(rest, "and").ok_or_else(bad)?;
            if rest.is_empty() {
                return Err(bad());
            }
        }
    }
    Ok(out)
}

fn keyword<'a>(s: &'a str, word: &str) -> Option<&'a str> {
    let (head, tail) = (s.get(..word.len())?, s.get(word.len()..)?);
    (head.eq_ignore_ascii_case(word) && tail.starts_with(char::is_whitespace)).then(|| tail.trim_start())
}

/// `'it''s'` and what follows.
fn quoted(s: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut rest = s.strip_prefix('\'')?;
    loop {
        let at = rest.find('\'')?;
        value.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        match rest.strip_prefix('\'') {
            Some(after) => {
                value.push('\'');
                rest = after;
            }
            None => return Some((value, rest)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terms() {
        let eq = |f: &str, v: &str| Term::Eq {
            field: f.into(),
            value: v.into(),
        };
        assert_eq!(parse("").unwrap(), []);
        assert_eq!(
            parse("roleName eq 'Network Contributor'").unwrap(),
            [eq("roleName", "Network Contributor")]
        );
        assert_eq!(
            parse("a eq 'it''s' AND b eq ''").unwrap(),
            [eq("a", "it's"), eq("b", "")]
        );
        let at = Term::Call { name: "atScope".into() };
        assert_eq!(
            parse("atScope() and principalId eq 'x'").unwrap(),
            [at, eq("principalId", "x")]
        );
        for bad in [
            "a",
            "a ne 'b'",
            "a eq b",
            "a eq 'b",
            "a eq 'b' or c eq 'd'",
            "a eq 'b' and ",
            "a eq 'b'c",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
