//! Media types: what the client sends and what it accepts.

pub use apimachinery::codec::Media;
use http::HeaderMap;
use http::header::{ACCEPT, CONTENT_TYPE};

pub const PROTOBUF: &str = "application/vnd.kubernetes.protobuf";

/// The header value of an encoding.
pub fn media_type(media: Media) -> &'static str {
    match media {
        Media::Json => "application/json",
        Media::Yaml => "application/yaml",
        Media::Protobuf => PROTOBUF,
    }
}

/// A transformation that the client asked for instead of the object itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum As {
    Object,
    /// `meta.k8s.io` version.
    Table(&'static str),
    Partial(&'static str),
}

/// Chosen form of the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Output {
    pub media: Media,
    pub shape: As,
    pub pretty: bool,
}

impl Output {
    pub const JSON: Output = Output {
        media: Media::Json,
        shape: As::Object,
        pretty: false,
    };
}

/// One entry of an `Accept` header.
#[derive(Clone, Debug, PartialEq)]
pub struct Accepted {
    pub media: String,
    pub params: Vec<(String, String)>,
    q: f32,
}

impl Accepted {
    pub fn param(&self, name: &str) -> &str {
        self.params.iter().find(|(k, _)| k == name).map_or("", |(_, v)| v)
    }
}

/// The entries of all `Accept` headers, best first.
pub fn accepted(headers: &HeaderMap) -> Vec<Accepted> {
    let mut all: Vec<Accepted> = headers
        .get_all(ACCEPT)
        .iter()
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| v.split(','))
        .filter_map(|entry| {
            let mut parts = entry.split(';').map(str::trim);
            let media = parts.next().filter(|m| !m.is_empty())?.to_ascii_lowercase();
            let params: Vec<(String, String)> = parts
                .filter_map(|p| p.split_once('='))
                .map(|(k, v)| (k.trim().to_ascii_lowercase(), v.trim().trim_matches('"').to_owned()))
                .collect();
            let q = params
                .iter()
                .find(|(k, _)| k == "q")
                .and_then(|(_, v)| v.parse().ok())
                .unwrap_or(1.0);
            Some(Accepted { media, params, q })
        })
        .collect();
    all.sort_by(|a, b| b.q.total_cmp(&a.q));
    all
}

/// What may be answered at an endpoint.
#[derive(Clone, Copy, Debug)]
pub struct Offer {
    pub protobuf: bool,
    /// Whether Table and PartialObjectMetadata are possible.
    pub transform: bool,
}

/// Picks the first acceptable form. `None` means 406.
pub fn choose(headers: &HeaderMap, offer: Offer) -> Option<Output> {
    let entries = accepted(headers);
    if entries.is_empty() {
        return Some(Output::JSON);
    }
    entries.iter().find_map(|entry| {
        let media = match entry.media.as_str() {
            "application/json" | "*/*" | "application/*" => Media::Json,
            "application/yaml" => Media::Yaml,
            PROTOBUF if offer.protobuf => Media::Protobuf,
            _ => return None,
        };
        let version = match entry.param("v") {
            "v1" => "v1",
            "v1beta1" => "v1beta1",
            _ => "",
        };
        let meta = entry.param("g") == "meta.k8s.io" && !version.is_empty();
        let shape = match entry.param("as") {
            "" => As::Object,
            "Table" if meta && offer.transform && media != Media::Protobuf => As::Table(version),
            "PartialObjectMetadata" | "PartialObjectMetadataList" if meta && offer.transform => As::Partial(version),
            _ => return None,
        };
        Some(Output {
            media,
            shape,
            pretty: entry.param("pretty") == "1",
        })
    })
}

/// Media type of a body, without parameters; empty if not given.
pub fn content_type(headers: &HeaderMap) -> String {
    let raw = headers
        .get(CONTENT_TYPE)
        .and_then(|v| v.to_str().ok())
        .unwrap_or_default();
    raw.split(';').next().unwrap_or_default().trim().to_ascii_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pick(accept: &str, offer: Offer) -> Option<Output> {
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT, accept.parse().unwrap());
        choose(&headers, offer)
    }

    #[test]
    fn first_possible_form_wins() {
        let all = Offer {
            protobuf: true,
            transform: true,
        };
        let table = pick("application/json;as=Table;v=v1;g=meta.k8s.io,application/json", all).unwrap();
        assert_eq!(table.shape, As::Table("v1"));
        let plain = Offer {
            protobuf: false,
            transform: false,
        };
        assert_eq!(
            pick("application/json;as=Table;v=v1;g=meta.k8s.io,application/json", plain),
            Some(Output::JSON)
        );
        assert_eq!(pick("application/json;as=Table;v=v1;g=meta.k8s.io", plain), None);
        assert_eq!(
            pick("application/vnd.kubernetes.protobuf, application/json", all)
                .unwrap()
                .media,
            Media::Protobuf
        );
        assert_eq!(
            pick("application/vnd.kubernetes.protobuf,application/json", plain)
                .unwrap()
                .media,
            Media::Json
        );
        assert_eq!(pick("text/plain", all), None);
        assert_eq!(
            pick("application/json;q=0.5,application/yaml", all).unwrap().media,
            Media::Yaml
        );
    }
}
