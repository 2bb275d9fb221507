//! Text of scalar types: what is accepted, and its canonical form.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use serde_json::Value;

use crate::quantity::Quantity;
use crate::table::Ty;
use crate::time;

/// The canonical value of `text`; `None` if the type has no textual form.
pub(super) fn from_text(ty: &Ty, text: &str) -> Option<Result<Value, String>> {
    Some(match ty {
        Ty::String | Ty::IntOrString | Ty::Duration => Ok(Value::String(text.to_owned())),
        Ty::Quantity => Quantity::parse(text)
            .map(|q| Value::String(q.to_string()))
            .map_err(|e| e.to_string()),
        Ty::Bytes => match STANDARD.decode(text) {
            Ok(_) => Ok(Value::String(text.to_owned())),
            Err(e) => Err(base64_error(text, &e)),
        },
        Ty::Time => timestamp(text).map(|t| Value::String(time::rfc3339(t))),
        Ty::MicroTime => timestamp(text).map(|t| Value::String(time::micro(t))),
        _ => return None,
    })
}

pub(super) fn timestamp(text: &str) -> Result<Timestamp, String> {
    time::parse(text).map_err(|_| {
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

/// A floating-point number in its canonical form: whole numbers have no point.
pub(super) fn double(number: f64) -> Value {
    /// Every whole number up to here has its own `f64`.
    const EXACT_MAX: f64 = 9_007_199_254_740_992.0;
    if number.fract() == 0.0 && number.abs() <= EXACT_MAX {
        return (number as i64).into();
    }
    serde_json::Number::from_f64(number).map_or(Value::Null, Value::Number)
}
