//! The wire server's interface information: which addresses the fabric gives to a machine's NICs.
//!
//! # Source
//! `GET http://168.63.129.16/machine/plugins?comp=nmagent&type=getinterfaceinfov1`; element and attribute names as the
//! azure-vnet plug-in reads them.

use std::net::IpAddr;

use ipnet::IpNet;
use quick_xml::Reader;
use quick_xml::events::{BytesStart, Event};
use thiserror::Error;

use crate::address::Mac;

/// Path and query of the request.
pub const PATH_AND_QUERY: &str = "/machine/plugins?comp=nmagent&type=getinterfaceinfov1";
/// A machine has at most 256 addresses; anything far larger is refused.
pub const DOCUMENT_BYTES_MAX: usize = 1 << 20;

/// All NICs of one machine.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Interfaces {
    pub interfaces: Vec<Interface>,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Interface {
    /// `None` is written `*`: any NIC.
    pub mac: Option<Mac>,
    pub primary: bool,
    pub subnets: Vec<InterfaceSubnet>,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub struct InterfaceSubnet {
    pub prefix: IpNet,
    pub addresses: Vec<InterfaceAddress>,
}

/// A primary address is the machine's own; the others are for its pods.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct InterfaceAddress {
    pub address: IpAddr,
    pub primary: bool,
}

#[derive(Debug, Error)]
pub enum ParseError {
    #[error("interface information of {bytes} bytes is too large")]
    TooLarge { bytes: usize },
    #[error("interface information is not well-formed XML")]
    Xml { source: quick_xml::Error },
    #[error("interface information: {element} stands outside {parent}")]
    Misplaced {
        element: &'static str,
        parent: &'static str,
    },
    #[error("interface information: {element} has no attribute {attribute}")]
    Missing {
        element: &'static str,
        attribute: &'static str,
    },
    #[error("interface information: {attribute} {value:?} of {element} is not valid")]
    Invalid {
        element: &'static str,
        attribute: &'static str,
        value: String,
    },
    #[error("interface information: the document has no Interfaces element")]
    NoInterfaces,
}

impl Interfaces {
    /// The document as the wire server sends it.
    pub fn to_xml(&self) -> String {
        let mut out = String::from("<Interfaces>");
        for interface in &self.interfaces {
            let mac = interface.mac.map_or_else(|| "*".to_owned(), Mac::bare);
            out += &format!("<Interface MacAddress=\"{mac}\" IsPrimary=\"{}\">", interface.primary);
            for subnet in &interface.subnets {
                out += &format!("<IPSubnet Prefix=\"{}\">", subnet.prefix);
                for a in &subnet.addresses {
                    out += &format!("<IPAddress Address=\"{}\" IsPrimary=\"{}\"/>", a.address, a.primary);
                }
                out += "</IPSubnet>";
            }
            out += "</Interface>";
        }
        out + "</Interfaces>"
    }

    /// Parses a document; unknown elements and attributes are passed over.
    pub fn parse(xml: &str) -> Result<Self, ParseError> {
        if xml.len() > DOCUMENT_BYTES_MAX {
            return Err(ParseError::TooLarge { bytes: xml.len() });
        }
        let mut out = Self::default();
        let mut seen_root = false;
        let mut reader = Reader::from_str(xml);
        loop {
            let start = match reader.read_event().map_err(|source| ParseError::Xml { source })? {
                Event::Eof => break,
                Event::Start(s) | Event::Empty(s) => s,
                _ => continue,
            };
            match start.local_name().as_ref() {
                "Interfaces" => seen_root = true,
                "Interface" => {
                    let element = "Interface";
                    let mac = match need(&start, element, "MacAddress")?.as_str() {
                        "*" => None,
                        text => Some(text.parse().map_err(|_| invalid(element, "MacAddress", text))?),
                    };
                    out.interfaces.push(Interface {
                        mac,
                        primary: is_primary(&start, element)?,
                        subnets: Vec::new(),
                    });
                }
                "IPSubnet" => {
                    let element = "IPSubnet";
                    let text = need(&start, element, "Prefix")?;
                    let prefix = text.parse().map_err(|_| invalid(element, "Prefix", &text))?;
                    let parent = ParseError::Misplaced {
                        element,
                        parent: "Interface",
                    };
                    let interface = out.interfaces.last_mut().ok_or(parent)?;
                    interface.subnets.push(InterfaceSubnet {
                        prefix,
                        addresses: Vec::new(),
                    });
                }
                "IPAddress" => {
                    let element = "IPAddress";
                    let text = need(&start, element, "Address")?;
                    let address = text.parse().map_err(|_| invalid(element, "Address", &text))?;
                    let parent = ParseError::Misplaced {
                        element,
                        parent: "IPSubnet",
                    };
                    let subnet = out
                        .interfaces
                        .last_mut()
                        .and_then(|i| i.subnets.last_mut())
                        .ok_or(parent)?;
                    subnet.addresses.push(InterfaceAddress {
                        address,
                        primary: is_primary(&start, element)?,
                    });
                }
                _ => {}
            }
        }
        if seen_root {
            Ok(out)
        } else {
            Err(ParseError::NoInterfaces)
        }
    }
}

fn attribute(start: &BytesStart<'_>, element: &'static str, name: &'static str) -> Result<Option<String>, ParseError> {
    for attribute in start.attributes() {
        let attribute = attribute.map_err(|_| invalid(element, name, "(malformed attributes)"))?;
        if attribute.key.local_name().as_ref() == name {
            let raw = attribute.value.into_owned();
            return Ok(Some(raw));
        }
    }
    Ok(None)
}

fn need(start: &BytesStart<'_>, element: &'static str, name: &'static str) -> Result<String, ParseError> {
    attribute(start, element, name)?.ok_or(ParseError::Missing {
        element,
        attribute: name,
    })
}

/// `true` or `false` in any case; absent is false.
fn is_primary(start: &BytesStart<'_>, element: &'static str) -> Result<bool, ParseError> {
    match attribute(start, element, "IsPrimary")?.as_deref() {
        None => Ok(false),
        Some(t) if t.eq_ignore_ascii_case("true") => Ok(true),
        Some(t) if t.eq_ignore_ascii_case("false") => Ok(false),
        Some(t) => Err(invalid(element, "IsPrimary", t)),
    }
}

fn invalid(element: &'static str, attribute: &'static str, value: &str) -> ParseError {
    ParseError::Invalid {
        element,
        attribute,
        value: value.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Interfaces {
        let address = |last, primary| InterfaceAddress {
            address: IpAddr::from([10, 240, 0, last]),
            primary,
        };
        let subnet = InterfaceSubnet {
            prefix: "10.240.0.0/16".parse().unwrap(),
            addresses: vec![address(4, true), address(5, false), address(6, false)],
        };
        Interfaces {
            interfaces: vec![Interface {
                mac: Some(crate::ROUTER_MAC),
                primary: true,
                subnets: vec![subnet],
            }],
        }
    }

    #[test]
    fn what_is_rendered_is_parsed_back() {
        let xml = sample().to_xml();
        assert!(
            xml.starts_with("<Interfaces><Interface MacAddress=\"123456789ABC\" IsPrimary=\"true\">"),
            "{xml}"
        );
        assert_eq!(Interfaces::parse(&xml).unwrap(), sample());
    }

    #[test]
    fn other_writers_documents_are_parsed() {
        let xml = "<?xml version=\"1.0\"?>\n<Interfaces xmlns=\"x\">\n <Interface MacAddress='*' IsPrimary='TRUE' Extra='1'>\
                   <IPSubnet Prefix='10.0.0.0/24'><IPAddress Address='10.0.0.4'></IPAddress></IPSubnet></Interface></Interfaces>";
        let parsed = Interfaces::parse(xml).unwrap();
        assert_eq!(parsed.interfaces[0].mac, None);
        assert!(parsed.interfaces[0].primary && !parsed.interfaces[0].subnets[0].addresses[0].primary);
    }

    #[test]
    fn bad_documents_are_refused() {
        for bad in [
            "",
            "<html/>",
            "<Interfaces><IPSubnet Prefix='10.0.0.0/24'/></Interfaces>",
            "<Interfaces><Interface IsPrimary='true'/></Interfaces>",
            "<Interfaces><Interface MacAddress='12' IsPrimary='true'/></Interfaces>",
            "<Interfaces><Interface MacAddress='*'><IPSubnet Prefix='x'/></Interface></Interfaces>",
            "<Interfaces><Interface MacAddress='*'></Wrong></Interfaces>",
        ] {
            assert!(Interfaces::parse(bad).is_err(), "{bad}");
        }
    }
}
