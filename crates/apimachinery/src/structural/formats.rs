//! Formats of text (`format` of a string): the ones upstream knows; others mean nothing.

use std::net::{Ipv4Addr, Ipv6Addr};

use base64::Engine as _;
use serde_json::Value;

use crate::validate::names;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    Int32,
    Int64,
    Float,
    Double,
    BsonObjectId,
    Uri,
    Email,
    Hostname,
    Ipv4,
    Ipv6,
    Cidr,
    Mac,
    /// Version 0 is any.
    Uuid(u8),
    Isbn,
    Isbn10,
    Isbn13,
    CreditCard,
    Ssn,
    HexColor,
    RgbColor,
    Byte,
    Password,
    Date,
    Duration,
    DateTime,
    ShortName,
    LongName,
}

const NAMES: [(&str, Format); 30] = [
    ("int32", Format::Int32),
    ("int64", Format::Int64),
    ("float", Format::Float),
    ("double", Format::Double),
    ("bsonobjectid", Format::BsonObjectId),
    ("uri", Format::Uri),
    ("email", Format::Email),
    ("hostname", Format::Hostname),
    ("ipv4", Format::Ipv4),
    ("ipv6", Format::Ipv6),
    ("cidr", Format::Cidr),
    ("mac", Format::Mac),
    ("uuid", Format::Uuid(0)),
    ("uuid3", Format::Uuid(3)),
    ("uuid4", Format::Uuid(4)),
    ("uuid5", Format::Uuid(5)),
    ("isbn", Format::Isbn),
    ("isbn10", Format::Isbn10),
    ("isbn13", Format::Isbn13),
    ("creditcard", Format::CreditCard),
    ("ssn", Format::Ssn),
    ("hexcolor", Format::HexColor),
    ("rgbcolor", Format::RgbColor),
    ("byte", Format::Byte),
    ("password", Format::Password),
    ("date", Format::Date),
    ("duration", Format::Duration),
    ("date-time", Format::DateTime),
    ("k8s-short-name", Format::ShortName),
    ("k8s-long-name", Format::LongName),
];

impl Format {
    /// The format of a schema, if it has one that means something for its type.
    pub fn of(schema: &Value) -> Option<Format> {
        let asked = schema["format"].as_str()?.replace('-', "");
        let format = NAMES.iter().find(|(name, _)| name.replace('-', "") == asked)?.1;
        let fits = match (schema["type"].as_str().unwrap_or_default(), format) {
            ("integer", Format::Int32 | Format::Int64) | ("number", Format::Float | Format::Double) => true,
            ("" | "string", Format::Int32 | Format::Int64 | Format::Float | Format::Double) => false,
            ("" | "string", _) => true,
            _ => false,
        };
        fits.then_some(format)
    }

    pub fn name(self) -> &'static str {
        NAMES.iter().find(|(_, f)| *f == self).map_or("", |(name, _)| name)
    }

    /// Whether `text` has the format.
    pub fn accepts(self, text: &str) -> bool {
        let digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
        match self {
            Format::Int32 | Format::Int64 | Format::Float | Format::Double | Format::Password => true,
            Format::BsonObjectId => text.len() == 24 && text.bytes().all(|b| b.is_ascii_hexdigit()),
            Format::Uri => uri(text),
            Format::Email => email(text),
            Format::Hostname => hostname(text),
            Format::Ipv4 => text.parse::<Ipv4Addr>().is_ok(),
            Format::Ipv6 => text.contains(':') && text.parse::<Ipv6Addr>().is_ok(),
            Format::Cidr => cidr(text),
            Format::Mac => mac(text),
            Format::Uuid(version) => uuid(text, version),
            Format::Isbn => isbn10(text) || isbn13(text),
            Format::Isbn10 => isbn10(text),
            Format::Isbn13 => isbn13(text),
            Format::CreditCard => credit_card(text),
            Format::Ssn => {
                let plain: String = text.chars().filter(|c| !matches!(c, '-' | ' ')).collect();
                plain.len() == 9 && digits(&plain)
            }
            Format::HexColor => {
                let hex = text.strip_prefix('#').unwrap_or(text);
                matches!(hex.len(), 3 | 6) && hex.bytes().all(|b| b.is_ascii_hexdigit())
            }
            Format::RgbColor => rgb(text),
            Format::Byte => base64::engine::general_purpose::STANDARD.decode(text).is_ok(),
            Format::Date => text.len() == 10 && text.parse::<jiff::civil::Date>().is_ok(),
            Format::DateTime => crate::time::parse(text).is_ok(),
            Format::Duration => duration(text),
            Format::ShortName => names::dns_label(text).is_empty(),
            Format::LongName => names::dns_subdomain(text).is_empty(),
        }
    }
}

/// An absolute URI, or an absolute path, as Go's `url.ParseRequestURI` takes it.
fn uri(text: &str) -> bool {
    if text.is_empty() || text.bytes().any(|b| b < 0x21 || b == 0x7f) {
        return false;
    }
    if text.starts_with('/') {
        return true;
    }
    let Some((scheme, rest)) = text.split_once(':') else {
        return false;
    };
    let mut letters = scheme.chars();
    letters.next().is_some_and(|c| c.is_ascii_alphabetic())
        && letters.all(|c| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.'))
        && !rest.is_empty()
}

fn email(text: &str) -> bool {
    let address = match (text.rfind('<'), text.strip_suffix('>')) {
        (Some(at), Some(inner)) => &inner[at + 1..],
        _ => text,
    };
    let Some((local, domain)) = address.rsplit_once('@') else {
        return false;
    };
    let word = |c: char| !c.is_whitespace() && !c.is_control() && !"()<>[]:;@\\,\"".contains(c);
    !local.is_empty() && !domain.is_empty() && local.chars().all(word) && domain.chars().all(word)
}

fn hostname(text: &str) -> bool {
    let label = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && label
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    !text.is_empty() && text.len() <= 255 && text.strip_suffix('.').unwrap_or(text).split('.').all(label)
}

fn cidr(text: &str) -> bool {
    let Some((address, length)) = text.split_once('/') else {
        return false;
    };
    let Ok(address) = address.parse::<std::net::IpAddr>() else {
        return false;
    };
    let max = if address.is_ipv4() { 32 } else { 128 };
    length.len() <= 3 && length.bytes().all(|b| b.is_ascii_digit()) && length.parse::<u32>().is_ok_and(|n| n <= max)
}

/// 6, 8 or 20 bytes in hex, in pairs by `:` or `-`, or in fours by `.`.
fn mac(text: &str) -> bool {
    let hex = |part: &str, length: usize| part.len() == length && part.bytes().all(|b| b.is_ascii_hexdigit());
    [(':', 2), ('-', 2), ('.', 4)].into_iter().any(|(separator, length)| {
        let parts: Vec<&str> = text.split(separator).collect();
        matches!(parts.len() * length / 2, 6 | 8 | 20) && parts.iter().all(|p| hex(p, length))
    })
}

fn uuid(text: &str, version: u8) -> bool {
    let plain: String = text.chars().filter(|c| *c != '-').collect();
    if plain.len() != 32 || !plain.bytes().all(|b| b.is_ascii_hexdigit()) || text.len() > 36 {
        return false;
    }
    let at = |i: usize| plain.as_bytes()[i].to_ascii_lowercase();
    let variant = matches!(at(16), b'8' | b'9' | b'a' | b'b');
    match version {
        3 => at(12) == b'3',
        4 => at(12) == b'4' && variant,
        5 => at(12) == b'5' && variant,
        _ => true,
    }
}

fn plain_digits(text: &str) -> String {
    text.chars().filter(|c| !matches!(c, '-' | ' ')).collect()
}

fn isbn10(text: &str) -> bool {
    let text = plain_digits(text);
    if text.len() != 10 || !text.is_ascii() {
        return false;
    }
    let mut sum = 0;
    for (i, c) in text.chars().enumerate() {
        let digit = match c {
            'X' if i == 9 => 10,
            c => match c.to_digit(10) {
                Some(digit) => digit,
                None => return false,
            },
        };
        sum += digit * (10 - i as u32);
    }
    sum.is_multiple_of(11)
}

fn isbn13(text: &str) -> bool {
    let text = plain_digits(text);
    let digits: Option<Vec<u32>> = text.chars().map(|c| c.to_digit(10)).collect();
    digits.is_some_and(|digits| {
        let sum: u32 = digits
            .iter()
            .enumerate()
            .map(|(i, d)| d * (1 + 2 * (i as u32 % 2)))
            .sum();
        digits.len() == 13 && sum.is_multiple_of(10)
    })
}

fn credit_card(text: &str) -> bool {
    let digits: Vec<u32> = text.chars().filter_map(|c| c.to_digit(10)).collect();
    let sum: u32 = digits
        .iter()
        .rev()
        .enumerate()
        .map(|(i, d)| match i % 2 {
            0 => *d,
            _ => d * 2 / 10 + d * 2 % 10,
        })
        .sum();
    (13..=16).contains(&digits.len()) && sum.is_multiple_of(10)
}

fn rgb(text: &str) -> bool {
    let inner = text.strip_prefix("rgb(").and_then(|t| t.strip_suffix(')'));
    inner.is_some_and(|inner| {
        let parts: Vec<&str> = inner.split(',').map(str::trim).collect();
        parts.len() == 3 && parts.iter().all(|p| p.parse::<u8>().is_ok())
    })
}

/// Go's durations (`1h30m`), or a number and a unit in words (`22 ns`, `2 weeks`).
fn duration(text: &str) -> bool {
    const UNITS: [&str; 7] = ["ns", "us", "\u{b5}s", "ms", "s", "m", "h"];
    let go = |text: &str| {
        let mut rest = text.trim_start_matches(['+', '-']);
        if rest == "0" {
            return true;
        }
        let mut parts = 0;
        while !rest.is_empty() {
            let number = rest
                .find(|c: char| !c.is_ascii_digit() && c != '.')
                .unwrap_or(rest.len());
            if rest[..number].parse::<f64>().is_err() {
                return false;
            }
            rest = &rest[number..];
            let unit = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
            if !UNITS.contains(&&rest[..unit]) {
                return false;
            }
            rest = &rest[unit..];
            parts += 1;
        }
        parts > 0
    };
    const WORDS: [&str; 24] = [
        "ns",
        "nano",
        "nanos",
        "nanosecond",
        "nanoseconds",
        "us",
        "micro",
        "micros",
        "microsecond",
        "microseconds",
        "ms",
        "milli",
        "millis",
        "millisecond",
        "milliseconds",
        "s",
        "sec",
        "secs",
        "seconds",
        "minutes",
        "hours",
        "days",
        "weeks",
        "w",
    ];
    let words = |text: &str| {
        let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
        let unit = unit.trim();
        let unit = unit.strip_suffix('s').unwrap_or(unit);
        !number.is_empty() && WORDS.iter().any(|w| *w == unit || w.strip_suffix('s') == Some(unit))
    };
    go(text) || words(text)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn formats_take_and_refuse() {
        for (name, good, bad) in [
            ("ipv4", "10.0.0.1", "10.0.0.256"),
            ("ipv6", "fe80::1", "10.0.0.1"),
            ("cidr", "10.0.0.0/8", "10.0.0.0/33"),
            ("mac", "01:23:45:67:89:ab", "01:23:45:67:89"),
            (
                "uuid",
                "a8098c1a-f86e-11da-bd1a-00112444be1e",
                "a8098c1a-f86e-11da-bd1a",
            ),
            (
                "uuid4",
                "025b0d74-00a2-4048-bf57-227c5111bb34",
                "025b0d74-00a2-3048-bf57-227c5111bb34",
            ),
            ("email", "joe@example.com", "joe"),
            ("hostname", "a.example.com", "-a.example"),
            ("uri", "https://example.com/a?b", "example com"),
            ("date", "2014-12-15", "2014-13-15"),
            ("date-time", "2014-12-15T19:30:20Z", "2014-12-15"),
            ("datetime", "2014-12-15T19:30:20.000Z", "x"),
            ("duration", "1h30m", "1 fortnight"),
            ("duration", "22 ns", "h"),
            ("byte", "aGk=", "a"),
            ("isbn", "0321751043", "0321751044"),
            ("isbn13", "978-0321751041", "978-0321751042"),
            ("creditcard", "4111-1111-1111-1111", "4111-1111-1111-1112"),
            ("ssn", "111-11-1111", "111-11"),
            ("hexcolor", "#FFFFFF", "#FFFF"),
            ("rgbcolor", "rgb(255,255,2)", "rgb(256,0,0)"),
            ("k8s-short-name", "a-b", "A"),
            ("k8s-long-name", "a.b", "a..b"),
            ("bsonobjectid", "507f1f77bcf86cd799439011", "507f"),
        ] {
            let format = Format::of(&json!({"type": "string", "format": name})).unwrap_or_else(|| panic!("{name}"));
            assert!(format.accepts(good), "{name}: {good}");
            assert!(!format.accepts(bad), "{name}: {bad}");
        }
    }

    #[test]
    fn unknown_formats_and_formats_of_other_types_mean_nothing() {
        assert_eq!(Format::of(&json!({"type": "string", "format": "made-up"})), None);
        assert_eq!(Format::of(&json!({"type": "string", "format": "int32"})), None);
        assert_eq!(Format::of(&json!({"type": "object", "format": "uri"})), None);
        assert_eq!(
            Format::of(&json!({"type": "integer", "format": "int32"})),
            Some(Format::Int32)
        );
    }
}
