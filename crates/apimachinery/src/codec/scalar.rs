//! Text of scalar types: what is accepted, and its canonical form.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use serde_json::Value;

use crate::table::Ty;

/// The canonical value of `text`; `None` if the type has no textual form.
pub(super) fn from_text(ty: &Ty, text: &str) -> Option<Result<Value, String>> {
    Some(match ty {
        Ty::String | Ty::IntOrString | Ty::Duration => Ok(Value::String(text.to_owned())),
        Ty::Quantity => quantity(text).map(Value::String),
        Ty::Bytes => match STANDARD.decode(text) {
            Ok(_) => Ok(Value::String(text.to_owned())),
            Err(e) => Err(base64_error(text, &e)),
        },
        Ty::Time => timestamp(text).map(|t| Value::String(time(t))),
        Ty::MicroTime => timestamp(text).map(|t| Value::String(micro_time(t))),
        _ => return None,
    })
}

/// RFC 3339 in UTC with whole seconds.
pub(super) fn time(t: Timestamp) -> String {
    t.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// RFC 3339 in UTC with six digits of fraction.
pub(super) fn micro_time(t: Timestamp) -> String {
    t.strftime("%Y-%m-%dT%H:%M:%S.%6fZ").to_string()
}

pub(super) fn timestamp(text: &str) -> Result<Timestamp, String> {
    let shape = text.len() >= 20 && text.as_bytes()[10] == b'T';
    text.parse::<Timestamp>().ok().filter(|_| shape).ok_or_else(|| {
        format!("parsing time {text:?} as \"2006-01-02T15:04:05Z07:00\": cannot parse {text:?} as \"2006\"")
    })
}

fn base64_error(text: &str, error: &base64::DecodeError) -> String {
    let at = match error {
        base64::DecodeError::InvalidByte(at, _) | base64::DecodeError::InvalidLastSymbol(at, _) => *at,
        _ => text.len(),
    };
    format!("illegal base64 data at input byte {at}")
}

/// Checks a quantity's form.
fn quantity(text: &str) -> Result<String, String> {
    const SUFFIXES: [&str; 16] = [
        "", "n", "u", "m", "k", "M", "G", "T", "P", "E", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei",
    ];
    let malformed =
        || "quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'".to_owned();
    let rest = text.strip_prefix(['+', '-']).unwrap_or(text);
    let digits = rest
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(rest.len());
    let (number, suffix) = rest.split_at(digits);
    if !number.contains(|c: char| c.is_ascii_digit()) || number.matches('.').count() > 1 {
        return Err(malformed());
    }
    let exponent = suffix
        .strip_prefix(['e', 'E'])
        .filter(|e| !e.is_empty())
        .is_some_and(|e| {
            let e = e.strip_prefix(['+', '-']).unwrap_or(e);
            !e.is_empty() && e.len() <= 3 && e.bytes().all(|b| b.is_ascii_digit())
        });
    if !exponent && !SUFFIXES.contains(&suffix) {
        return Err("unable to parse quantity's suffix".into());
    }
    Ok(text.to_owned())
}
