//! The verbs on resources.

pub mod connect;
pub mod create;
pub mod delete;
pub mod eviction;
pub mod list;
pub mod manage;
pub mod reviews;
pub mod subresources;
pub mod update;
pub mod watch;
pub mod write;

use std::sync::Arc;

use apimachinery::selector::{FieldSelector, LabelSelector};
use apimachinery::status::Status;
use apimachinery::table::TypeTable;
use http::{HeaderMap, HeaderValue, Response, StatusCode};

use crate::cluster::Cluster;
use crate::negotiate::{self, Offer, Output};
use crate::object::Object;
use crate::request::{Query, RequestInfo, Target};
use crate::served::Served;
use crate::{Body, UserInfo, respond};

/// One authorized request on a resource.
pub struct Context {
    pub cluster: Arc<Cluster>,
    pub served: Arc<Served>,
    pub user: UserInfo,
    pub info: RequestInfo,
    pub target: Target,
    pub query: Query,
    pub headers: HeaderMap,
}

impl Context {
    /// The negotiated form of the answer, or 406.
    pub fn output(&self, transform: bool) -> Result<Output, Status> {
        let offer = Offer {
            protobuf: !self.served.info.custom,
            transform,
        };
        negotiate::choose(&self.headers, offer).ok_or_else(|| not_acceptable(offer))
    }

    pub fn dry_run(&self) -> Result<bool, Status> {
        match self.query.all("dryRun") {
            [] => Ok(false),
            all if all.iter().all(|v| v == "All") => Ok(true),
            all => Err(Status::bad_request(&format!(
                "Invalid value: {all:?}: dryRun: Unsupported value: supported values: \"All\""
            ))),
        }
    }

    /// The types that this request's object is made of.
    pub fn types(&self) -> Arc<TypeTable> {
        match &self.served.custom {
            Some(custom) => custom.table.clone(),
            None => self.cluster.table(),
        }
    }

    /// The object the request names.
    pub fn find(&self) -> Result<Arc<Object>, Status> {
        self.served
            .resource
            .get(self.namespace(), &self.target.name)
            .ok_or_else(|| Status::not_found(&self.target.group_resource(), &self.target.name))
    }

    /// Namespace part of the key: empty for cluster-scoped resources.
    pub fn namespace(&self) -> &str {
        if self.served.info.namespaced {
            &self.target.namespace
        } else {
            ""
        }
    }

    /// Answers with one object in the negotiated form.
    pub fn object(&self, code: StatusCode, object: &Arc<Object>, output: Output) -> Response<Body> {
        let body = respond::encode_object(
            &self.cluster,
            &self.served,
            object,
            output,
            self.query.get("includeObject"),
        );
        let gzip = respond::accepts_gzip(&self.headers);
        let response = respond::bytes(code, negotiate::media_type(output.media), bytes::Bytes::new());
        respond::compress(response, body, gzip)
    }
}

/// Adds `Warning` headers in the form clients print.
pub fn warn(response: &mut Response<Body>, warnings: &[String]) {
    for warning in warnings.iter().take(20) {
        let text = warning
            .replace('\\', "\\\\")
            .replace('"', "\\\"")
            .replace(['\n', '\r'], " ");
        if let Ok(value) = HeaderValue::from_str(&format!("299 - \"{text}\"")) {
            response.headers_mut().append("warning", value);
        }
    }
}

/// Which media types would have been possible.
pub fn not_acceptable(offer: Offer) -> Status {
    let mut types = vec!["application/json", "application/yaml"];
    if offer.protobuf {
        types.push(negotiate::PROTOBUF);
    }
    Status::not_acceptable(&types)
}

/// What a list or watch selects.
#[derive(Clone)]
pub struct Filter {
    /// Empty for all.
    pub namespace: String,
    /// Only this object, from the path or from `metadata.name=`.
    pub name: Option<String>,
    pub labels: LabelSelector,
    pub fields: FieldSelector,
    pub selectable: &'static [&'static str],
    /// Set if the fields are those that a definition makes selectable: they are read from the object.
    content: Option<Arc<Served>>,
}

impl Filter {
    /// Reads the selectors of a request.
    pub fn of(cx: &Context) -> Result<Self, Status> {
        let labels =
            LabelSelector::parse(cx.query.get("labelSelector")).map_err(|e| Status::bad_request(&e.to_string()))?;
        let fields =
            FieldSelector::parse(cx.query.get("fieldSelector")).map_err(|e| Status::bad_request(&e.to_string()))?;
        let selectable = cx.served.resource.fields;
        for requirement in &fields.requirements {
            let field = requirement.field.as_str();
            let known = field == "metadata.name"
                || (field == "metadata.namespace" && cx.served.info.namespaced)
                || selectable.contains(&field)
                || cx.served.info.selectable.iter().any(|f| f == field);
            if !known && cx.served.custom.is_some() {
                return Err(Status::bad_request(&format!("field label not supported: {field}")));
            }
            if !known {
                let plain = selectable.is_empty() && !cx.served.info.custom;
                return Err(Status::bad_request(&if plain {
                    format!("{field:?} is not a known field selector: only \"metadata.name\", \"metadata.namespace\"")
                } else {
                    format!("field label not supported: {field}")
                }));
            }
        }
        let name = if cx.target.name.is_empty() {
            fields.exact("metadata.name").map(str::to_owned)
        } else {
            Some(cx.target.name.clone())
        };
        let namespace = match cx.namespace() {
            "" => fields.exact("metadata.namespace").unwrap_or_default().to_owned(),
            given => given.to_owned(),
        };
        Ok(Filter {
            namespace,
            name,
            labels,
            content: (!fields.is_everything() && !cx.served.info.selectable.is_empty()).then(|| cx.served.clone()),
            fields,
            selectable,
        })
    }

    pub fn matches(&self, object: &Arc<Object>) -> bool {
        let header = object.header();
        if !self.namespace.is_empty() && *header.namespace != *self.namespace {
            return false;
        }
        if self.name.as_ref().is_some_and(|name| *header.name != **name) {
            return false;
        }
        if !self.labels.is_everything() && !self.labels.matches(&*header.labels) {
            return false;
        }
        let content: Vec<(&str, String)> = match &self.content {
            Some(served) => {
                let value = served.value(object);
                let fields = served.info.selectable.iter();
                fields
                    .map(|f| (f.as_str(), crate::fields::value(&value, f).into_owned()))
                    .collect()
            }
            None => Vec::new(),
        };
        self.fields.matches(|field| match field {
            "metadata.name" => &header.name,
            "metadata.namespace" => &header.namespace,
            other => match content.iter().find(|(name, _)| *name == other) {
                Some((_, value)) => value,
                None => {
                    let place = self.selectable.iter().position(|f| *f == other);
                    place.and_then(|i| header.fields.get(i)).map_or("", |v| v)
                }
            },
        })
    }

    /// Whether anything but the namespace restricts the result.
    pub fn is_selective(&self) -> bool {
        !self.labels.is_everything() || !self.fields.is_everything()
    }
}
