//! Paths and operations of every served resource.

use crate::gvk::{Gvk, api_version};
use crate::table::{ResourceInfo, Subresource, TypeTable};

/// What an operation sends.
pub(super) enum Body {
    None,
    /// Content types of the patches it takes.
    Patch(&'static [&'static str]),
    Type {
        name: String,
        required: bool,
    },
}

/// One operation.
pub(super) struct Operation {
    pub path: String,
    pub method: &'static str,
    pub id: String,
    pub tag: String,
    /// `x-kubernetes-action`.
    pub action: &'static str,
    pub gvk: Gvk,
    pub body: Body,
    /// Definition of the answer; text if there is none.
    pub answer: Option<String>,
    /// Query parameters: name and type.
    pub query: Vec<(&'static str, &'static str)>,
    custom: bool,
}

impl Operation {
    pub fn produces(&self) -> &'static [&'static str] {
        match (self.action, self.custom) {
            ("connect", _) => &["*/*"],
            (_, true) => &["application/json", "application/yaml"],
            (_, false) => &[
                "application/json",
                "application/yaml",
                "application/vnd.kubernetes.protobuf",
            ],
        }
    }
}

const PATCHES: &[&str] = &[
    "application/json-patch+json",
    "application/merge-patch+json",
    "application/strategic-merge-patch+json",
    "application/apply-patch+yaml",
];
const CUSTOM_PATCHES: &[&str] = &[
    "application/json-patch+json",
    "application/merge-patch+json",
    "application/apply-patch+yaml",
];

type Query = &'static [(&'static str, &'static str)];
const PRETTY: Query = &[("pretty", "string")];
const WRITE: Query = &[
    ("dryRun", "string"),
    ("fieldManager", "string"),
    ("fieldValidation", "string"),
    ("pretty", "string"),
];
const PATCH: Query = &[
    ("dryRun", "string"),
    ("fieldManager", "string"),
    ("fieldValidation", "string"),
    ("force", "boolean"),
    ("pretty", "string"),
];
const DELETE: Query = &[
    ("dryRun", "string"),
    ("gracePeriodSeconds", "integer"),
    ("orphanDependents", "boolean"),
    ("propagationPolicy", "string"),
    ("pretty", "string"),
];
const LIST: Query = &[
    ("allowWatchBookmarks", "boolean"),
    ("continue", "string"),
    ("fieldSelector", "string"),
    ("labelSelector", "string"),
    ("limit", "integer"),
    ("pretty", "string"),
    ("resourceVersion", "string"),
    ("resourceVersionMatch", "string"),
    ("sendInitialEvents", "boolean"),
    ("timeoutSeconds", "integer"),
    ("watch", "boolean"),
];

/// Every operation of the resources that `wanted` takes, in path order within a resource.
pub(super) fn all(table: &TypeTable, wanted: impl Fn(&ResourceInfo) -> bool) -> Vec<Operation> {
    let mut out = Vec::new();
    for resource in table.resources().filter(|r| wanted(r)) {
        Resource { table, r: resource }.operations(&mut out);
    }
    out
}

struct Resource<'t> {
    table: &'t TypeTable,
    r: &'t ResourceInfo,
}

impl Resource<'_> {
    fn operations(&self, out: &mut Vec<Operation>) {
        let r = self.r;
        let root = if r.group.is_empty() { "/api" } else { "/apis" };
        let base = format!("{root}/{}", api_version(&r.group, &r.version));
        let collection = if r.namespaced {
            format!("{base}/namespaces/{{namespace}}/{}", r.plural)
        } else {
            format!("{base}/{}", r.plural)
        };
        let item = format!("{collection}/{{name}}");
        let own = self.definition(&r.gvk);
        let list = self.definition(&r.gvk.with_kind(&r.list_kind()));
        let status = Some(format!("{}Status", crate::table::META));
        if r.namespaced && r.has_verb("list") {
            let path = format!("{base}/{}", r.plural);
            let mut op = self.operation(&path, "get", "list", "list", "", list.clone(), LIST);
            op.id = format!("list{}{}ForAllNamespaces", self.prefix(), r.kind);
            out.push(op);
        }
        for verb in &r.verbs {
            let op = match verb.as_str() {
                "list" => self.operation(&collection, "get", "list", "list", "", list.clone(), LIST),
                "create" => {
                    let mut op = self.operation(&collection, "post", "create", "post", "", own.clone(), WRITE);
                    op.body = self.body(&r.gvk);
                    op
                }
                "deletecollection" => {
                    let query = [DELETE, &LIST[1..5]].concat();
                    let mut op = self.operation(
                        &collection,
                        "delete",
                        "deleteCollection",
                        "deletecollection",
                        "",
                        status.clone(),
                        &[],
                    );
                    op.query = query;
                    op.body = self.options();
                    op
                }
                "get" => self.operation(&item, "get", "read", "get", "", own.clone(), PRETTY),
                "update" => {
                    let mut op = self.operation(&item, "put", "replace", "put", "", own.clone(), WRITE);
                    op.body = self.body(&r.gvk);
                    op
                }
                "patch" => self.patch(&item, "", own.clone()),
                "delete" => {
                    let mut op = self.operation(&item, "delete", "delete", "delete", "", status.clone(), DELETE);
                    op.body = self.options();
                    op
                }
                _ => continue,
            };
            out.push(op);
        }
        for sub in &r.subresources {
            self.subresource(&item, sub, out);
        }
    }

    fn subresource(&self, item: &str, sub: &Subresource, out: &mut Vec<Operation>) {
        let path = format!("{item}/{}", sub.name);
        let suffix = title(&sub.name);
        let kind = self.definition(&sub.kind);
        let connect = matches!(sub.name.as_str(), "exec" | "attach" | "portforward" | "proxy");
        for verb in &sub.verbs {
            let (method, word, action) = match verb.as_str() {
                "get" => ("get", "read", "get"),
                "create" => ("post", "create", "post"),
                "update" => ("put", "replace", "put"),
                "patch" => ("patch", "patch", "patch"),
                "delete" => ("delete", "delete", "delete"),
                _ => continue,
            };
            if connect {
                let word = format!("connect{}", title(method));
                let mut op = self.operation(&path, method, &word, "connect", &suffix, None, connect_query(&sub.name));
                op.gvk = sub.kind.clone();
                out.push(op);
                continue;
            }
            let mut op = match method {
                "patch" => self.patch(&path, &suffix, kind.clone()),
                "get" if sub.name == "log" => self.operation(&path, method, word, action, &suffix, None, LOG),
                "get" => self.operation(&path, method, word, action, &suffix, kind.clone(), PRETTY),
                _ => {
                    let mut op = self.operation(&path, method, word, action, &suffix, kind.clone(), WRITE);
                    op.body = self.body(&sub.kind);
                    op
                }
            };
            op.gvk = sub.kind.clone();
            out.push(op);
        }
    }

    fn patch(&self, path: &str, suffix: &str, answer: Option<String>) -> Operation {
        let mut op = self.operation(path, "patch", "patch", "patch", suffix, answer, PATCH);
        op.body = Body::Patch(if self.r.custom { CUSTOM_PATCHES } else { PATCHES });
        op
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "the parts of one operation, each of another meaning"
    )]
    fn operation(
        &self,
        path: &str,
        method: &'static str,
        word: &str,
        action: &'static str,
        suffix: &str,
        answer: Option<String>,
        query: Query,
    ) -> Operation {
        let scope = if self.r.namespaced { "Namespaced" } else { "" };
        Operation {
            path: path.into(),
            method,
            id: format!("{word}{}{scope}{}{suffix}", self.prefix(), self.r.kind),
            tag: self.tag(),
            action,
            gvk: self.r.gvk.clone(),
            body: Body::None,
            answer,
            query: query.to_vec(),
            custom: self.r.custom,
        }
    }

    fn definition(&self, gvk: &Gvk) -> Option<String> {
        self.table.kind_of(gvk).map(|k| k.def.name.to_string())
    }

    fn body(&self, gvk: &Gvk) -> Body {
        self.definition(gvk)
            .map_or(Body::None, |name| Body::Type { name, required: true })
    }

    fn options(&self) -> Body {
        Body::Type {
            name: format!("{}DeleteOptions", crate::table::META),
            required: false,
        }
    }

    /// `CoreV1`, `RbacAuthorizationV1`.
    fn prefix(&self) -> String {
        format!("{}{}", title(&self.group_word()), title(&self.r.version))
    }

    /// `core_v1`, `rbacAuthorization_v1`.
    fn tag(&self) -> String {
        format!("{}_{}", self.group_word(), self.r.version)
    }

    fn group_word(&self) -> String {
        if self.r.group.is_empty() {
            return "core".into();
        }
        let short = self.r.group.strip_suffix(".k8s.io").unwrap_or(&self.r.group);
        let mut parts = short.split(['.', '-']);
        let first = parts.next().unwrap_or_default().to_owned();
        parts.fold(first, |word, part| word + &title(part))
    }
}

const LOG: Query = &[
    ("container", "string"),
    ("follow", "boolean"),
    ("insecureSkipTLSVerifyBackend", "boolean"),
    ("limitBytes", "integer"),
    ("pretty", "string"),
    ("previous", "boolean"),
    ("sinceSeconds", "integer"),
    ("tailLines", "integer"),
    ("timestamps", "boolean"),
];

fn connect_query(name: &str) -> Query {
    const STREAMS: Query = &[
        ("container", "string"),
        ("stderr", "boolean"),
        ("stdin", "boolean"),
        ("stdout", "boolean"),
        ("tty", "boolean"),
        ("command", "string"),
    ];
    match name {
        "exec" => STREAMS,
        "attach" => &STREAMS[..5],
        "portforward" => &[("ports", "integer")],
        _ => &[("path", "string")],
    }
}

fn title(word: &str) -> String {
    let mut chars = word.chars();
    chars
        .next()
        .map_or(String::new(), |c| c.to_uppercase().chain(chars).collect())
}
