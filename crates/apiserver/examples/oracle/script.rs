//! The requests that follow from a kind's objects, sent to both servers.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, Result};
use http::Method;
use http_body_util::BodyExt;
use parking_lot::Mutex;
use reconcile::Client;
use serde_json::{Value, json};

use crate::{
    call::{Answer, Call, JSON, send},
    cases::{Kind, merged},
    compare::{Difference, differences},
    known::Known,
    normal::normal,
};

const MERGE: &str = "application/merge-patch+json";
const STRATEGIC: &str = "application/strategic-merge-patch+json";
const JSON_PATCH: &str = "application/json-patch+json";
const APPLY: &str = "application/apply-patch+yaml";
const TABLE: &str = "application/json;as=Table;v=v1;g=meta.k8s.io";
const PARTIAL: &str = "application/json;as=PartialObjectMetadata;v=v1;g=meta.k8s.io";
const PARTIAL_LIST: &str = "application/json;as=PartialObjectMetadataList;v=v1;g=meta.k8s.io";
/// How long the last events may take.
const WATCH_S: u64 = 5;

type Events = Arc<Mutex<Vec<Value>>>;

#[derive(Default)]
pub struct Outcome {
    pub equal: usize,
    pub differing: Vec<(String, Vec<Difference>)>,
    pub known: Vec<String>,
}

/// The namespace of the cases, with the account that pods need: no controller makes it here.
pub async fn namespace(client: &Client) -> Result<()> {
    let account = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}});
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "oracle"}});
    for (path, body) in [
        ("/api/v1/namespaces", &namespace),
        ("/api/v1/namespaces/oracle/serviceaccounts", &account),
    ] {
        let answer = send(client, &Call::post(path, body.clone())).await?;
        anyhow::ensure!(answer.code == 201 || answer.code == 409, "{path}: {}", answer.body);
    }
    Ok(())
}

struct Run<'a> {
    ours: &'a Client,
    theirs: &'a Client,
    kind: &'a Kind,
    known: &'a mut Known,
    outcome: Outcome,
    /// The object as each side has it: ours, theirs.
    stored: [Value; 2],
}

pub async fn run(ours: &Client, theirs: &Client, kind: &Kind, known: &mut Known) -> Result<Outcome> {
    let mut run = Run {
        ours,
        theirs,
        kind,
        known,
        outcome: Outcome::default(),
        stored: [Value::Null, Value::Null],
    };
    if run.is_served().await? {
        run.all().await?;
    }
    Ok(run.outcome)
}

impl Run<'_> {
    fn named(&self) -> String {
        format!(
            "{}/{}",
            self.kind.path,
            self.kind.minimal["metadata"]["name"].as_str().unwrap_or_default()
        )
    }

    /// A kind that only one side knows is one difference, not fifty.
    async fn is_served(&mut self) -> Result<bool> {
        let call = if self.kind.create_only {
            return Ok(true);
        } else {
            Call::get(&self.kind.path)
        };
        let ours = send(self.ours, &call).await?;
        if ours.code != 404 {
            return Ok(true);
        }
        self.both("the resource is served", false, |_| call.clone()).await?;
        Ok(false)
    }

    async fn all(&mut self) -> Result<()> {
        let path = self.kind.path.clone();
        let dry = format!("{path}?dryRun=All");
        let minimal = self.kind.minimal.clone();
        if self.kind.create_only {
            self.both("create", false, |_| Call::post(&path, minimal.clone()))
                .await?;
            self.refusals(&path).await?;
            for (name, patch) in &self.kind.objects {
                let object = merged(&minimal, patch);
                self.both(&format!("create {name}"), false, |_| Call::post(&path, object.clone()))
                    .await?;
            }
            return Ok(());
        }
        let ours = self.watch(self.ours).await?;
        let theirs = self.watch(self.theirs).await?;
        self.both("create", true, |_| Call::post(&path, minimal.clone()))
            .await?;
        self.both("create again", false, |_| Call::post(&path, minimal.clone()))
            .await?;
        for (name, patch) in &self.kind.objects {
            let object = merged(&minimal, patch);
            self.both(&format!("create {name}"), false, |_| Call::post(&dry, object.clone()))
                .await?;
        }
        self.refusals(&dry).await?;
        self.reads().await?;
        self.changes().await?;
        self.applies().await?;
        self.deletion().await?;
        self.watched(ours, theirs).await
    }

    async fn refusals(&mut self, path: &str) -> Result<()> {
        let minimal = if self.kind.create_only {
            self.kind.minimal.clone()
        } else {
            // Not the name of the object that is there.
            merged(&self.kind.minimal, &json!({"metadata": {"name": "refused"}}))
        };
        for (name, patch) in &self.kind.invalid {
            let object = merged(&minimal, patch);
            self.both(&format!("refuse {name}"), false, |_| Call::post(path, object.clone()))
                .await?;
        }
        let separator = if path.contains('?') { '&' } else { '?' };
        let strict = format!("{path}{separator}fieldValidation=Strict");
        let warn = format!("{path}{separator}fieldValidation=Warn");
        let unknown = merged(
            &minimal,
            &json!({"metadata": {"unknownOfMeta": 1}, "unknownOfRoot": {"a": 1}}),
        );
        self.both("unknown fields, strict", false, |_| {
            Call::post(&strict, unknown.clone())
        })
        .await?;
        self.both("unknown fields, warn", false, |_| Call::post(&warn, unknown.clone()))
            .await?;
        for (name, patch) in [
            ("a name that is none", json!({"metadata": {"name": "Not_A.Name-"}})),
            ("no name", json!({"metadata": {"name": null}})),
            (
                "labels that are none",
                json!({"metadata": {"labels": {"not a key": "x", "fine": "not a value!"}}}),
            ),
            (
                "annotation keys that are none",
                json!({"metadata": {"annotations": {"/a": "x"}}}),
            ),
            ("finalizers that are none", json!({"metadata": {"finalizers": ["x"]}})),
            (
                "owners without parts",
                json!({"metadata": {"ownerReferences": [{"kind": "X", "apiVersion": "v1", "name": "", "uid": ""}]}}),
            ),
            ("another kind", json!({"kind": "Other"})),
            ("another version", json!({"apiVersion": "other/v9"})),
            ("a list where an object belongs", json!({"metadata": []})),
            ("another namespace", json!({"metadata": {"namespace": "elsewhere"}})),
            ("a resource version", json!({"metadata": {"resourceVersion": "1"}})),
            (
                "a drawn name",
                json!({"metadata": {"name": null, "generateName": "drawn-"}}),
            ),
        ] {
            let object = merged(&minimal, &patch);
            self.both(name, false, |_| Call::post(path, object.clone())).await?;
        }
        Ok(())
    }

    async fn reads(&mut self) -> Result<()> {
        let (path, named) = (self.kind.path.clone(), self.named());
        self.both("get", true, |_| Call::get(&named)).await?;
        self.both("get as table", false, |_| Call::get(&named).accept(TABLE))
            .await?;
        self.both("get metadata", false, |_| Call::get(&named).accept(PARTIAL))
            .await?;
        let own = format!(
            "{path}?fieldSelector=metadata.name%3D{}",
            self.kind.minimal["metadata"]["name"].as_str().unwrap_or_default()
        );
        self.both("list", false, |_| Call::get(&own)).await?;
        self.both("list as table", false, |_| Call::get(&own).accept(TABLE))
            .await?;
        self.both("list metadata", false, |_| Call::get(&own).accept(PARTIAL_LIST))
            .await?;
        for query in [
            "labelSelector=a%3Db,c+notin+(d),!e&limit=1",
            "labelSelector=a+b",
            "fieldSelector=no.such.field%3Dx",
            "limit=-1",
            "resourceVersionMatch=Exact",
            "continue=nonsense",
        ] {
            let path = format!("{path}?{query}");
            self.both(&format!("list {query}"), false, |_| Call::get(&path)).await?;
        }
        for selector in &self.kind.selectors {
            let encoded: String = selector
                .bytes()
                .map(|b| {
                    if b == b'=' {
                        "%3D".to_owned()
                    } else {
                        char::from(b).to_string()
                    }
                })
                .collect();
            let path = format!("{path}?fieldSelector={encoded}");
            self.both(&format!("list by {selector}"), false, |_| Call::get(&path))
                .await?;
        }
        let missing = format!("{path}/missing");
        self.both("get what is not there", false, |_| Call::get(&missing))
            .await?;
        Ok(())
    }

    async fn changes(&mut self) -> Result<()> {
        let named = self.named();
        let patch = |kind: &'static str, body: Value| {
            let named = named.clone();
            move |_: &Value| Call::new(Method::PATCH, &named, kind, Some(body.clone()))
        };
        self.both("replace with itself", true, |o| {
            Call::new(Method::PUT, &named, JSON, Some(o.clone()))
        })
        .await?;
        let stale = json!({"metadata": {"resourceVersion": "1"}});
        self.both("replace what has changed since", false, |o| {
            Call::new(Method::PUT, &named, JSON, Some(merged(o, &stale)))
        })
        .await?;
        let other = json!({"metadata": {"uid": "00000000-0000-0000-0000-000000000000"}});
        self.both("replace another uid", false, |o| {
            Call::new(Method::PUT, &named, JSON, Some(merged(o, &other)))
        })
        .await?;
        let label = json!({"metadata": {"labels": {"by": "merge"}}});
        self.both("label by merge patch", true, patch(MERGE, label)).await?;
        let label = json!({"metadata": {"labels": {"by": "strategic"}, "annotations": {"a": "b"}}});
        self.both("label by strategic merge patch", true, patch(STRATEGIC, label))
            .await?;
        let label = json!([{"op": "test", "path": "/metadata/labels/by", "value": "strategic"}, {"op": "replace", "path": "/metadata/labels/by", "value": "json"}]);
        self.both("label by JSON patch", true, patch(JSON_PATCH, label)).await?;
        let fails = json!([{"op": "test", "path": "/metadata/labels/by", "value": "other"}]);
        self.both("a JSON patch whose test fails", false, patch(JSON_PATCH, fails))
            .await?;
        self.both(
            "a JSON patch of nothing",
            false,
            patch(JSON_PATCH, json!([{"op": "remove", "path": "/spec/none"}])),
        )
        .await?;
        self.both("a patch of no known type", false, patch("text/plain", json!({})))
            .await?;
        self.both(
            "a patch of the name",
            false,
            patch(MERGE, json!({"metadata": {"name": "other"}})),
        )
        .await?;
        for (name, body) in &self.kind.updates {
            self.both(&format!("update {name}"), true, patch(MERGE, body.clone()))
                .await?;
        }
        for (name, body) in &self.kind.strategic {
            self.both(&format!("strategic {name}"), true, patch(STRATEGIC, body.clone()))
                .await?;
        }
        let status = format!("{named}/status");
        for (name, body) in &self.kind.status {
            self.both(&format!("status {name}"), true, |_| {
                Call::new(Method::PATCH, &status, MERGE, Some(body.clone()))
            })
            .await?;
        }
        Ok(())
    }

    async fn applies(&mut self) -> Result<()> {
        let named = self.named();
        let minimal = self.kind.minimal.clone();
        let mut applies = vec![
            (
                "first".to_owned(),
                json!({"metadata": {"labels": {"by": "apply"}}}),
                "&force=true",
            ),
            (
                "second".to_owned(),
                json!({"metadata": {"labels": {"by": "other"}}}),
                "",
            ),
            ("first".to_owned(), json!({"metadata": {"labels": {"more": "1"}}}), ""),
        ];
        applies.extend(self.kind.applies.iter().map(|(m, p)| (m.clone(), p.clone(), "")));
        for (n, (manager, patch, force)) in applies.into_iter().enumerate() {
            let body = merged(&minimal, &patch);
            let path = format!("{named}?fieldManager={manager}{force}");
            self.both(&format!("apply {} by {manager}", n + 1), true, |_| {
                Call::new(Method::PATCH, &path, APPLY, Some(body.clone()))
            })
            .await?;
        }
        self.both("apply without a manager", false, |_| {
            Call::new(Method::PATCH, &named, APPLY, Some(minimal.clone()))
        })
        .await?;
        Ok(())
    }

    async fn deletion(&mut self) -> Result<()> {
        let named = self.named();
        let delete = |path: &str, body: Value| Call::new(Method::DELETE, path, JSON, Some(body));
        self.both("delete dry", false, |_| delete(&named, json!({"dryRun": ["All"]})))
            .await?;
        let other = json!({"preconditions": {"uid": "00000000-0000-0000-0000-000000000000"}});
        self.both("delete another uid", false, |_| delete(&named, other.clone()))
            .await?;
        self.both("delete with a policy that is none", false, |_| {
            delete(&named, json!({"propagationPolicy": "None"}))
        })
        .await?;
        self.both("delete", false, |_| {
            delete(
                &named,
                json!({"gracePeriodSeconds": 0, "propagationPolicy": "Background"}),
            )
        })
        .await?;
        self.both("get what was deleted", false, |_| Call::get(&named)).await?;
        self.both("delete again", false, |_| delete(&named, json!({}))).await?;
        Ok(())
    }

    async fn watch(&self, client: &Client) -> Result<Events> {
        let list = send(client, &Call::get(&self.kind.path)).await?;
        let version = list.body["metadata"]["resourceVersion"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        let name = self.kind.minimal["metadata"]["name"].as_str().unwrap_or_default();
        let path = format!(
            "{}?watch=1&resourceVersion={version}&fieldSelector=metadata.name%3D{name}&timeoutSeconds=300",
            self.kind.path
        );
        let mut body = client.stream(&path).await.context("opening a watch")?;
        let events = Events::default();
        let seen = events.clone();
        tokio::spawn(async move {
            let mut rest = vec![];
            while let Some(Ok(frame)) = body.frame().await {
                rest.extend_from_slice(frame.data_ref().map(AsRef::as_ref).unwrap_or_default());
                while let Some(end) = rest.iter().position(|b| *b == b'\n') {
                    let line: Vec<u8> = rest.drain(..=end).collect();
                    if let Ok(event) = serde_json::from_slice(&line) {
                        seen.lock().push(event);
                    }
                }
            }
        });
        Ok(events)
    }

    /// The same events in the same order with the same objects.
    async fn watched(&mut self, ours: Events, theirs: Events) -> Result<()> {
        let ended = |events: &Events| events.lock().last().is_some_and(|e| e["type"] == "DELETED");
        for _ in 0..WATCH_S * 50 {
            if ended(&ours) && ended(&theirs) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let mut ours = Value::Array(ours.lock().clone());
        let mut theirs = Value::Array(theirs.lock().clone());
        normal(&mut ours);
        normal(&mut theirs);
        let kinds = |events: &Value| -> Vec<String> {
            let events = events.as_array().into_iter().flatten();
            events
                .map(|e| e["type"].as_str().unwrap_or_default().to_owned())
                .collect()
        };
        let mut found = vec![];
        if kinds(&ours) == kinds(&theirs) {
            differences("", &ours, &theirs, &mut found);
        } else {
            differences("/types", &json!(kinds(&ours)), &json!(kinds(&theirs)), &mut found);
        }
        self.judge("watch", found);
        Ok(())
    }

    /// Sends a request to both; `keep` if the answer is the object as it now is.
    async fn both(&mut self, case: &str, keep: bool, call: impl Fn(&Value) -> Call) -> Result<()> {
        let ours = send(self.ours, &call(&self.stored[0]))
            .await
            .with_context(|| case.to_owned())?;
        let theirs = send(self.theirs, &call(&self.stored[1]))
            .await
            .with_context(|| case.to_owned())?;
        if keep {
            for (stored, answer) in self.stored.iter_mut().zip([&ours, &theirs]) {
                if answer.code < 300 {
                    *stored = answer.body.clone();
                }
            }
        }
        let (ours, theirs) = (normalized(ours), normalized(theirs));
        let found = compare(&ours, &theirs);
        self.judge(case, found);
        Ok(())
    }

    fn judge(&mut self, case: &str, found: Vec<Difference>) {
        let mut unknown = vec![];
        for difference in found {
            match self.known.reason(&self.kind.name, case, &difference) {
                Some(reason) => self
                    .outcome
                    .known
                    .push(format!("{case}: {}: {reason}", difference.path)),
                None => unknown.push(difference),
            }
        }
        if unknown.is_empty() {
            self.outcome.equal += 1;
        } else {
            self.outcome.differing.push((case.to_owned(), unknown));
        }
    }
}

fn normalized(mut answer: Answer) -> Answer {
    normal(&mut answer.body);
    answer
}

fn compare(ours: &Answer, theirs: &Answer) -> Vec<Difference> {
    let mut found = vec![];
    differences("code", &json!(ours.code), &json!(theirs.code), &mut found);
    differences("warnings", &json!(ours.warnings), &json!(theirs.warnings), &mut found);
    if ours.code == theirs.code || ours.code >= 400 && theirs.code >= 400 {
        differences("", &ours.body, &theirs.body, &mut found);
    } else {
        let brief = |body: &Value| body.get("message").cloned().unwrap_or_else(|| body["kind"].clone());
        differences("answer", &brief(&ours.body), &brief(&theirs.body), &mut found);
    }
    found
}
