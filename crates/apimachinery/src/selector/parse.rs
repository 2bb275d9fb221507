//! The query form of label selectors: tokens and grammar.

use super::{LabelRequirement, SelectorError, requirement};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Token<'a> {
    Word(&'a str),
    Comma,
    Open,
    Close,
    Equals,
    NotEquals,
    Not,
    Greater,
    Less,
    End,
}

impl Token<'_> {
    pub fn unexpected(self, expected: &'static str) -> SelectorError {
        let found = match self {
            Token::Word(word) => word,
            Token::Comma => ",",
            Token::Open => "(",
            Token::Close => ")",
            Token::Equals => "=",
            Token::NotEquals => "!=",
            Token::Not => "!",
            Token::Greater => ">",
            Token::Less => "<",
            Token::End => "",
        };
        SelectorError::Syntax {
            found: found.to_owned(),
            expected,
        }
    }
}

pub(super) struct Parser<'a> {
    pub text: &'a str,
    pub pos: usize,
}

impl<'a> Parser<'a> {
    pub fn peek(&self) -> Token<'a> {
        Parser {
            text: self.text,
            pos: self.pos,
        }
        .next()
    }

    pub fn next(&mut self) -> Token<'a> {
        let bytes = self.text.as_bytes();
        while bytes.get(self.pos).is_some_and(u8::is_ascii_whitespace) {
            self.pos += 1;
        }
        let Some(&first) = bytes.get(self.pos) else {
            return Token::End;
        };
        let second_is_equals = bytes.get(self.pos + 1) == Some(&b'=');
        let (token, length) = match first {
            b',' => (Token::Comma, 1),
            b'(' => (Token::Open, 1),
            b')' => (Token::Close, 1),
            b'=' => (Token::Equals, if second_is_equals { 2 } else { 1 }),
            b'!' if second_is_equals => (Token::NotEquals, 2),
            b'!' => (Token::Not, 1),
            b'>' => (Token::Greater, 1),
            b'<' => (Token::Less, 1),
            _ => {
                let rest = &self.text[self.pos..];
                let end = rest
                    .find(|c: char| c.is_ascii_whitespace() || ",()=!<>".contains(c))
                    .unwrap_or(rest.len());
                (Token::Word(&rest[..end]), end)
            }
        };
        self.pos += length;
        token
    }

    pub fn requirement(&mut self) -> Result<LabelRequirement, SelectorError> {
        let negated = self.peek() == Token::Not;
        if negated {
            self.next();
        }
        let key = match self.next() {
            Token::Word(word) => word,
            other => return Err(other.unexpected("'!', 'identifier'")),
        };
        if negated {
            return requirement(key, "DoesNotExist", Vec::new());
        }
        match self.peek() {
            Token::End | Token::Comma => requirement(key, "Exists", Vec::new()),
            Token::Equals => self.exact(key, "In"),
            Token::NotEquals => self.exact(key, "NotIn"),
            Token::Greater => self.exact(key, "Gt"),
            Token::Less => self.exact(key, "Lt"),
            Token::Word("in") => self.set(key, "In"),
            Token::Word("notin") => self.set(key, "NotIn"),
            other => Err(other.unexpected("in, notin, =, ==, !=, gt, lt")),
        }
    }

    /// The value after an operator; an absent one is the empty string.
    fn exact(&mut self, key: &str, operator: &str) -> Result<LabelRequirement, SelectorError> {
        self.next();
        let value = match self.peek() {
            Token::Word(word) => {
                self.next();
                word
            }
            Token::End | Token::Comma => "",
            other => return Err(other.unexpected("identifier")),
        };
        requirement(key, operator, vec![value.to_owned()])
    }

    fn set(&mut self, key: &str, operator: &str) -> Result<LabelRequirement, SelectorError> {
        self.next();
        match self.next() {
            Token::Open => {}
            other => return Err(other.unexpected("'('")),
        }
        let mut values = Vec::new();
        loop {
            // Two commas in a row, or a comma at an end, name the empty value.
            match self.peek() {
                Token::Word(word) => {
                    self.next();
                    values.push(word.to_owned());
                }
                Token::Comma | Token::Close => values.push(String::new()),
                other => return Err(other.unexpected("',', ')' or identifier")),
            }
            match self.next() {
                Token::Comma => {}
                Token::Close => return requirement(key, operator, values),
                other => return Err(other.unexpected("',' or ')'")),
            }
        }
    }
}
