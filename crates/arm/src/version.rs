//! The `api-version` query parameter: mandatory, date-shaped, and inside one wide window. There is one internal model; the
//! version never changes what is stored.

use crate::error::{Answer, Fault};

/// First and last accepted dates, as `YYYY-MM-DD`. Older versions had other shapes (and clients that died with them).
const FIRST: &str = "2015-01-01";
const LAST: &str = "2027-12-31";

/// Checks the parameter of one request. `published` goes into the message of a refusal.
pub fn check(version: Option<&str>, what: &str, published: &[&str]) -> Answer<()> {
    let Some(v) = version.filter(|v| !v.is_empty()) else {
        let message = "The api-version query parameter (?api-version=) is required for all requests.";
        return Err(Fault::bad_request("MissingApiVersionParameter", message));
    };
    let date = v.get(..10).unwrap_or_default();
    let suffix = v.get(10..).unwrap_or_default();
    let suffix_ok = matches!(
        suffix.to_ascii_lowercase().as_str(),
        "" | "-preview" | "-alpha" | "-beta" | "-privatepreview"
    );
    if is_date(date) && suffix_ok && (FIRST..=LAST).contains(&date) {
        return Ok(());
    }
    let message = format!(
        "The api-version '{v}' is not served for '{what}'. Use a date from {FIRST} to {LAST}, for example one of: {}.",
        published.join(", ")
    );
    Err(Fault::bad_request("InvalidApiVersionParameter", message))
}

fn is_date(s: &str) -> bool {
    let b = s.as_bytes();
    let digits = |r: std::ops::Range<usize>| b[r].iter().all(u8::is_ascii_digit);
    b.len() == 10
        && b[4] == b'-'
        && b[7] == b'-'
        && digits(0..4)
        && digits(5..7)
        && digits(8..10)
        && ("01"..="12").contains(&&s[5..7])
        && ("01"..="31").contains(&&s[8..10])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn window() {
        let code = |v| check(v, "t", &["2024-01-01"]).err().map(|f| f.code);
        for ok in ["2022-01-01", "2026-06-01", "2024-05-01-preview", "2015-01-01"] {
            assert_eq!(code(Some(ok)), None, "{ok}");
        }
        assert_eq!(code(None).as_deref(), Some("MissingApiVersionParameter"));
        assert_eq!(code(Some("")).as_deref(), Some("MissingApiVersionParameter"));
        for bad in [
            "1999-01-01",
            "2024-13-01",
            "latest",
            "2024-01-01x",
            "2024-1-1",
            "2024-01-01-préview",
        ] {
            assert_eq!(code(Some(bad)).as_deref(), Some("InvalidApiVersionParameter"), "{bad}");
        }
    }
}
