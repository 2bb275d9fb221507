//! Resource quantities: exact fixed-point numbers with Kubernetes' suffixes and canonical form.
//!
//! Values are held in nano units; finer ones round away from zero, and magnitudes are capped at 2^63-1, as upstream
//! (k8s.io/apimachinery/pkg/api/resource, 1.36).

use std::cmp::Ordering;
use std::fmt;
use std::ops::{Add, Neg, Sub};
use std::str::FromStr;

const NANO: i128 = 1_000_000_000;
const VALUE_MAX: i128 = i64::MAX as i128 * NANO;
const DECIMAL_SUFFIXES: [(i32, &str); 10] = [
    (18, "E"),
    (15, "P"),
    (12, "T"),
    (9, "G"),
    (6, "M"),
    (3, "k"),
    (0, ""),
    (-3, "m"),
    (-6, "u"),
    (-9, "n"),
];
const BINARY_SUFFIXES: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];

/// The family of suffixes a quantity prints with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Format {
    /// `m`, none, `k`, `M`, ...
    #[default]
    DecimalSi,
    /// `Ki`, `Mi`, ...
    BinarySi,
    /// `e3`, `e6`, ...
    DecimalExponent,
}

/// Why text is no quantity; the texts are upstream's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum QuantityError {
    /// Not a number with a suffix.
    #[error("quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'")]
    Format,
    /// An unknown suffix.
    #[error("unable to parse quantity's suffix")]
    Suffix,
}

/// An exact number with a preferred suffix family. Equality and order are by value alone.
#[derive(Debug, Clone, Copy, Default)]
pub struct Quantity {
    nano: i128,
    format: Format,
}

impl Quantity {
    /// Zero.
    pub const ZERO: Self = Self {
        nano: 0,
        format: Format::DecimalSi,
    };

    /// Parses text such as `500m`, `1.5Gi`, `1e3`.
    pub fn parse(text: &str) -> Result<Self, QuantityError> {
        let (negative, unsigned) = match text.as_bytes().first() {
            Some(b'-') => (true, &text[1..]),
            Some(b'+') => (false, &text[1..]),
            _ => (false, text),
        };
        let number_end = unsigned
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(unsigned.len());
        let (number, suffix) = unsigned.split_at(number_end);
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') {
            return Err(QuantityError::Format);
        }
        let (format, scale) = parse_suffix(suffix)?;
        let magnitude = match scale {
            Scale::Two(power) => whole_and_fraction(whole, fraction, |n| n.checked_mul(1i128 << power)),
            Scale::Ten(power) => decimal(whole, fraction, power),
        };
        let nano = magnitude.unwrap_or(VALUE_MAX).min(VALUE_MAX);
        Ok(Self {
            nano: if negative { -nano } else { nano },
            format,
        })
    }

    /// `value` whole units.
    pub const fn from_units(value: i64, format: Format) -> Self {
        Self {
            nano: value as i128 * NANO,
            format,
        }
    }

    /// `milli` thousandths, printed in decimal.
    pub const fn from_milli(milli: i64) -> Self {
        Self {
            nano: milli as i128 * (NANO / 1000),
            format: Format::DecimalSi,
        }
    }

    /// Thousandths, rounded away from zero, capped to i64. CPU is counted so.
    pub fn milli(&self) -> i64 {
        clamp(divide_away(self.nano, NANO / 1000))
    }

    /// Whole units, rounded away from zero. Memory, storage and counts are so.
    pub fn units(&self) -> i64 {
        clamp(divide_away(self.nano, NANO))
    }

    /// The same as [`Self::units`], by the name that reads well for memory.
    pub fn bytes(&self) -> i64 {
        self.units()
    }

    /// The suffix family it was written with.
    pub fn format(&self) -> Format {
        self.format
    }

    /// The value is zero.
    pub fn is_zero(&self) -> bool {
        self.nano == 0
    }

    /// The value is below zero.
    pub fn is_negative(&self) -> bool {
        self.nano < 0
    }
}

fn clamp(value: i128) -> i64 {
    value.clamp(i64::MIN.into(), i64::MAX.into()) as i64
}

fn divide_away(value: i128, by: i128) -> i128 {
    let quotient = value / by;
    if value % by == 0 {
        quotient
    } else {
        quotient + value.signum()
    }
}

enum Scale {
    Two(u32),
    Ten(i32),
}

fn parse_suffix(suffix: &str) -> Result<(Format, Scale), QuantityError> {
    if let Some((power, _)) = DECIMAL_SUFFIXES.iter().find(|(_, s)| *s == suffix) {
        return Ok((Format::DecimalSi, Scale::Ten(*power)));
    }
    if let Some(step) = BINARY_SUFFIXES.iter().position(|s| *s == suffix) {
        return Ok((Format::BinarySi, Scale::Two(step as u32 * 10)));
    }
    match suffix.as_bytes() {
        [b'e' | b'E', digits @ ..] if !digits.is_empty() => {
            let text = &suffix[1..];
            let unsigned = text.strip_prefix(['+', '-']).unwrap_or(text);
            if unsigned.is_empty() || !unsigned.bytes().all(|b| b.is_ascii_digit()) {
                return Err(QuantityError::Suffix);
            }
            // Powers beyond this are 0 or the cap whatever the digits.
            let power = unsigned.parse::<i32>().unwrap_or(1000).min(1000);
            Ok((
                Format::DecimalExponent,
                Scale::Ten(if text.starts_with('-') { -power } else { power }),
            ))
        }
        _ if suffix.bytes().all(|b| b"eEinumkKMGTP+-0123456789".contains(&b)) => Err(QuantityError::Suffix),
        _ => Err(QuantityError::Format),
    }
}

/// Nano units of `whole.fraction`, each part scaled by `scale`; `None` on overflow. Fraction digits past the ninth
/// only round up: with a binary suffix they are below a unit in practice.
fn whole_and_fraction(whole: &str, fraction: &str, scale: impl Fn(i128) -> Option<i128>) -> Option<i128> {
    let whole = digits(whole)?.checked_mul(NANO).and_then(&scale)?;
    let kept = &fraction[..fraction.len().min(9)];
    let mut nano = digits(kept)?.checked_mul(10i128.pow(9 - kept.len() as u32))?;
    if fraction[kept.len()..].bytes().any(|b| b != b'0') {
        nano += 1;
    }
    whole.checked_add(scale(nano)?)
}

/// Nano units of `whole.fraction * 10^power`, rounded up; `None` on overflow.
fn decimal(whole: &str, fraction: &str, power: i32) -> Option<i128> {
    let fraction = fraction.trim_end_matches('0');
    let text = format!("{whole}{fraction}");
    let text = text.trim_start_matches('0');
    if text.is_empty() {
        return Some(0);
    }
    let shift = power + 9 - fraction.len() as i32;
    if shift >= 0 {
        return digits(text)?.checked_mul(10i128.checked_pow(shift as u32)?);
    }
    let cut = shift.unsigned_abs() as usize;
    if cut >= text.len() {
        return Some(1);
    }
    let (kept, dropped) = text.split_at(text.len() - cut);
    digits(kept)?.checked_add(i128::from(dropped.bytes().any(|b| b != b'0')))
}

fn digits(text: &str) -> Option<i128> {
    text.bytes()
        .try_fold(0i128, |n, b| n.checked_mul(10)?.checked_add(i128::from(b - b'0')))
}

/// Prints the canonical form: no fraction, no precision lost, the largest suffix that allows both.
impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.nano == 0 {
            return f.write_str("0");
        }
        if self.format == Format::BinarySi && self.nano.abs() >= 1024 * NANO {
            let mut value = divide_away(self.nano, NANO);
            let mut step = 0;
            while step < 6 && value % 1024 == 0 {
                value /= 1024;
                step += 1;
            }
            return write!(f, "{value}{}", BINARY_SUFFIXES[step]);
        }
        for (power, suffix) in DECIMAL_SUFFIXES {
            let unit = 10i128.pow((power + 9) as u32);
            if self.nano % unit == 0 {
                let value = self.nano / unit;
                return match self.format {
                    Format::DecimalExponent if power == 0 => write!(f, "{value}"),
                    Format::DecimalExponent => write!(f, "{value}e{power}"),
                    Format::DecimalSi | Format::BinarySi => write!(f, "{value}{suffix}"),
                };
            }
        }
        // Unreachable: every nano value is a multiple of the smallest unit, which prints it exactly.
        write!(f, "{}n", self.nano)
    }
}

impl FromStr for Quantity {
    type Err = QuantityError;

    fn from_str(text: &str) -> Result<Self, QuantityError> {
        Self::parse(text)
    }
}

impl PartialEq for Quantity {
    fn eq(&self, other: &Self) -> bool {
        self.nano == other.nano
    }
}

impl Eq for Quantity {}

impl PartialOrd for Quantity {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Quantity {
    fn cmp(&self, other: &Self) -> Ordering {
        self.nano.cmp(&other.nano)
    }
}

/// The sum keeps the left side's format unless the left side is zero; capped.
impl Add for Quantity {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        let format = if self.nano == 0 { other.format } else { self.format };
        Self {
            nano: (self.nano + other.nano).clamp(-VALUE_MAX, VALUE_MAX),
            format,
        }
    }
}

impl Sub for Quantity {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        self + -other
    }
}

impl Neg for Quantity {
    type Output = Self;

    fn neg(self) -> Self {
        Self {
            nano: -self.nano,
            format: self.format,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn canonical_forms() {
        for (text, canonical) in [
            ("0", "0"),
            ("0.5", "500m"),
            ("1000m", "1"),
            ("1500m", "1500m"),
            ("100M", "100M"),
            ("1000k", "1M"),
            ("1024Mi", "1Gi"),
            ("1536Mi", "1536Mi"),
            ("1.5Gi", "1536Mi"),
            ("1Ki", "1Ki"),
            ("0.5Ki", "512"),
            ("1000Ki", "1000Ki"),
            ("1e3", "1e3"),
            ("12e-1", "1200e-3"),
            ("1E", "1E"),
            ("1e0", "1"),
            ("+5", "5"),
            ("-200m", "-200m"),
            (".5", "500m"),
            ("5.", "5"),
            ("1n", "1n"),
            ("0.1n", "1n"),
            ("1.0000000001", "1000000001n"),
            ("9223372036854775807", "9223372036854775807"),
            ("99999999999999999999", "9223372036854775807"),
            ("100Ei", "9223372036854775807"),
            ("1e999999", "9223372036854775807"),
        ] {
            assert_eq!(
                Quantity::parse(text).map(|q| q.to_string()).as_deref(),
                Ok(canonical),
                "{text}"
            );
        }
    }

    #[test]
    fn bad_text() {
        for text in ["", ".", "-", "1.1.1", "x", "1 ", "1.1.Mi", " 1", "1%", "1b"] {
            assert_eq!(Quantity::parse(text), Err(QuantityError::Format), "{text}");
        }
        for text in [
            "1mi",
            "1K",
            "1ki",
            "1e",
            "1MiB".trim_end_matches('B').repeat(2).as_str(),
            "1kk",
        ] {
            assert!(Quantity::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn units_and_sums() {
        let q = |t| Quantity::parse(t).unwrap();
        assert_eq!(q("250m").milli(), 250);
        assert_eq!(q("0.1m").milli(), 1);
        assert_eq!(q("2").milli(), 2000);
        assert_eq!(q("1.5").units(), 2);
        assert_eq!(q("128Mi").bytes(), 134_217_728);
        assert_eq!((q("0") + q("128Mi") + q("896Mi")).to_string(), "1Gi");
        assert_eq!((q("1") - q("250m")).to_string(), "750m");
        assert!(q("1Gi") > q("1G") && q("1000m") == q("1"));
    }
}
