//! Regular expressions of schemas, in Go's dialect.
//!
//! The `regex` crate matches in time linear in the text, as Go's package does, so no pattern can make a server hang. Its
//! dialect differs in a few places, which [`translate`] rewrites: classes such as `\d` are ASCII in Go, a brace that
//! begins no repetition stands for itself, and inside brackets `[`, `&&`, `--` and `~~` have no meaning.

use std::sync::OnceLock;

use regex::{Regex, RegexBuilder};

/// Most different patterns of one schema.
pub(super) const PATTERNS_MAX: usize = 2_000;
/// Bound on a compiled pattern, bytes.
const COMPILED_BYTES_MAX: usize = 1 << 20;
/// Bound on the memory a match may cache, bytes.
const CACHE_BYTES_MAX: usize = 256 << 10;
/// Deepest nesting of groups.
const NEST_MAX: u32 = 100;

/// A pattern that was found to compile. The program itself is made at the first match: most patterns of most schemas are
/// never matched, and programs are large.
#[derive(Debug)]
pub(crate) struct Pattern {
    pub text: Box<str>,
    program: OnceLock<Option<Regex>>,
}

impl Pattern {
    /// # Errors
    /// Why it is no regular expression, or too large a one.
    pub fn compile(text: &str) -> Result<Pattern, String> {
        build(text)?;
        Ok(Pattern {
            text: text.into(),
            program: OnceLock::new(),
        })
    }

    /// Whether the pattern occurs in `text`.
    pub fn matches(&self, text: &str) -> bool {
        let program = self.program.get_or_init(|| build(&self.text).ok());
        program.as_ref().is_some_and(|p| p.is_match(text))
    }
}

fn build(text: &str) -> Result<Regex, String> {
    RegexBuilder::new(&translate(text))
        .size_limit(COMPILED_BYTES_MAX)
        .dfa_size_limit(CACHE_BYTES_MAX)
        .nest_limit(NEST_MAX)
        .build()
        .map_err(|error| match error {
            regex::Error::CompiledTooBig(limit) => format!("its program is larger than {limit} bytes"),
            other => {
                let printed = other.to_string();
                let last = printed.lines().last().unwrap_or_default();
                let why = match last.trim_start_matches("error: ") {
                    "unclosed group" => format!("missing closing ): `{text}`"),
                    "unopened group" => format!("unexpected ): `{text}`"),
                    "unclosed character class" => format!("missing closing ]: `{text}`"),
                    other => other.to_owned(),
                };
                format!("error parsing regexp: {why}")
            }
        })
}

/// Go's expression in the words of the `regex` crate.
fn translate(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let mut out = String::with_capacity(text.len() + 16);
    let mut class = false;
    let mut i = 0;
    while i < chars.len() {
        let c = chars[i];
        let next = chars.get(i + 1).copied();
        match (c, next) {
            ('\\', Some('Q')) if !class => {
                i += 2;
                while i < chars.len() && !(chars[i] == '\\' && chars.get(i + 1) == Some(&'E')) {
                    out.push_str(&regex::escape(&chars[i].to_string()));
                    i += 1;
                }
                i += 2;
                continue;
            }
            ('\\', Some(word)) => {
                match (word, class) {
                    ('d', false) => out.push_str("[0-9]"),
                    ('d', true) => out.push_str("0-9"),
                    ('D', _) => out.push_str("[^0-9]"),
                    ('w', false) => out.push_str("[0-9A-Za-z_]"),
                    ('w', true) => out.push_str("0-9A-Za-z_"),
                    ('W', _) => out.push_str("[^0-9A-Za-z_]"),
                    ('s', false) => out.push_str("[\\t\\n\\f\\r ]"),
                    ('s', true) => out.push_str("\\t\\n\\f\\r "),
                    ('S', _) => out.push_str("[^\\t\\n\\f\\r ]"),
                    ('b', false) => out.push_str("(?-u:\\b)"),
                    // The text is UTF-8, where only the Unicode form of this one is safe.
                    (other, _) => {
                        out.push('\\');
                        out.push(other);
                    }
                }
                i += 2;
                continue;
            }
            ('[', _) if !class => {
                class = true;
                out.push('[');
                if next == Some('^') {
                    out.push('^');
                    i += 1;
                }
                // A bracket that comes first stands for itself.
                if chars.get(i + 1) == Some(&']') {
                    out.push_str("\\]");
                    i += 1;
                }
            }
            ('[', Some(':')) => {
                // A named class, if it ends as one.
                let end = chars[i + 2..].iter().position(|c| *c == ':');
                match end.filter(|end| chars.get(i + 2 + end + 1) == Some(&']')) {
                    Some(end) => {
                        out.extend(&chars[i..=i + 2 + end + 1]);
                        i += 2 + end + 2;
                        continue;
                    }
                    None => out.push_str("\\["),
                }
            }
            ('[', _) => out.push_str("\\["),
            (']', _) if class => {
                class = false;
                out.push(']');
            }
            ('&' | '~', Some(n)) if class && n == c => {
                out.push('\\');
                out.push(c);
            }
            ('-', Some('-')) if class => out.push_str("\\-"),
            ('{', _) if !class && !is_repeat(&chars[i + 1..]) => out.push_str("\\{"),
            _ => out.push(c),
        }
        i += 1;
    }
    out
}

/// Whether `n}`, `n,}` or `n,m}` follows.
fn is_repeat(rest: &[char]) -> bool {
    let digits = |from: usize| rest[from..].iter().take_while(|c| c.is_ascii_digit()).count();
    let first = digits(0);
    match (first, rest.get(first)) {
        (0, _) => false,
        (_, Some('}')) => true,
        (_, Some(',')) => rest.get(first + 1 + digits(first + 1)) == Some(&'}'),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_mean_what_they_mean_in_go() {
        for (pattern, text, want) in [
            (r"^\d+$", "12", true),
            (r"^\d+$", "\u{0661}", false),
            (r"^[\w.-]+$", "a_b.c-d", true),
            (r"^[\w]$", "\u{e9}", false),
            (r"^[[:alpha:]]+$", "ab", true),
            (r"^[[]$", "[", true),
            (r"^[]a]$", "]", true),
            (r"^[^]a]$", "b", true),
            (r"^[a&&b]$", "&", true),
            (r"^a{$", "a{", true),
            (r"^a{2,3}$", "aaa", true),
            (r"^\Qa.b\E$", "a.b", true),
            (r"^\Qa.b\E$", "axb", false),
            (r"^(https?)://[^\s/$.?#].[^\s]*$", "https://example.com", true),
            (r"^\/a$", "/a", true),
            (r"^\S+$", "a b", false),
        ] {
            let compiled = Pattern::compile(pattern).unwrap_or_else(|e| panic!("{pattern}: {e}"));
            assert_eq!(compiled.matches(text), want, "{pattern} on {text:?}");
        }
    }

    #[test]
    fn what_go_refuses_and_what_is_too_large_is_refused() {
        for pattern in [
            "(",
            "a**b(",
            "(?=a)",
            "(a)\\1",
            "[b-a]",
            "(a{1000}){1000}",
            "\\pN{900}{100}",
        ] {
            assert!(Pattern::compile(pattern).is_err(), "{pattern}");
        }
        assert!(Pattern::compile(&"(".repeat(200)).is_err());
    }

    #[test]
    fn nested_repetition_is_linear() {
        let pattern = Pattern::compile("^(a+)+$").unwrap();
        assert!(!pattern.matches(&format!("{}b", "a".repeat(200_000))));
    }
}
