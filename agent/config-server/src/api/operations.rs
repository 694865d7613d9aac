//! The operations of the API, each declared once: its address, who may use it, what it takes and answers, and its handler.
//! The router and the OpenAPI document both come from this, so that neither has what the other lacks.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Router;
use axum::handler::Handler;
use axum::routing::MethodFilter;
use utoipa::ToSchema;
use utoipa::openapi::path::{OperationBuilder, ParameterBuilder, ParameterIn, PathItem};
use utoipa::openapi::request_body::RequestBodyBuilder;
use utoipa::openapi::schema::{ArrayBuilder, ObjectBuilder, Type};
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{
    ComponentsBuilder, ContentBuilder, HttpMethod, InfoBuilder, OpenApi, OpenApiBuilder, Paths, Ref, RefOr, Required,
    ResponseBuilder, Schema,
};

use super::access::{Access, guard};
use super::schema::FailureSchema;
use crate::core::Core;
use crate::model::UserRole;

type Schemas = BTreeMap<String, RefOr<Schema>>;

/// One operation, without its handler.
pub struct Operation {
    summary: &'static str,
    /// `None`: anybody, without a token.
    role: Option<UserRole>,
    status: u16,
    or_status: Option<u16>,
    takes: Option<RefOr<Schema>>,
    answers: Option<(&'static str, RefOr<Schema>)>,
    query: Vec<(&'static str, &'static str, Type)>,
    schemas: Schemas,
    takes_if_match: bool,
}

impl Operation {
    pub fn new(role: UserRole, summary: &'static str) -> Self {
        Self {
            summary,
            role: Some(role),
            status: 200,
            or_status: None,
            takes: None,
            answers: None,
            query: Vec::new(),
            schemas: Schemas::new(),
            takes_if_match: false,
        }
    }

    pub fn public(summary: &'static str) -> Self {
        Self { role: None, ..Self::new(UserRole::Reader, summary) }
    }

    fn know<T: ToSchema>(&mut self) -> RefOr<Schema> {
        let mut used = Vec::new();
        T::schemas(&mut used);
        self.schemas.extend(used);
        self.schemas.insert(T::name().into_owned(), T::schema());
        Ref::from_schema_name(T::name()).into()
    }

    pub fn takes<T: ToSchema>(mut self) -> Self {
        self.takes = Some(self.know::<T>());
        self
    }

    pub fn answers<T: ToSchema>(mut self) -> Self {
        self.answers = Some(("application/json", self.know::<T>()));
        self
    }

    pub fn answers_list<T: ToSchema>(mut self) -> Self {
        let items = self.know::<T>();
        self.answers = Some(("application/json", ArrayBuilder::new().items(items).build().into()));
        self
    }

    /// Long work: the answer is a job.
    pub fn starts_job(self) -> Self {
        Self { status: 202, ..self.answers::<crate::jobs::Job>() }
    }

    /// Text, or bytes, that are no JSON.
    pub fn answers_plain(mut self, content: &'static str) -> Self {
        self.answers = Some((content, ObjectBuilder::new().schema_type(Type::String).build().into()));
        self
    }

    /// The same answer with another status: what was asked for is not done yet.
    pub fn or_status(self, status: u16) -> Self {
        Self { or_status: Some(status), ..self }
    }

    /// A change that may be meant for one version of the thing: its handler looks at `If-Match`.
    pub fn takes_if_match(self) -> Self {
        Self { takes_if_match: true, ..self }
    }

    pub fn status(self, status: u16) -> Self {
        Self { status, ..self }
    }

    pub fn query(mut self, name: &'static str, of: Type, description: &'static str) -> Self {
        self.query.push((name, description, of));
        self
    }
}

/// Router and document as they grow.
pub struct Operations {
    core: Arc<Core>,
    access: Access,
    router: Router<Arc<Core>>,
    public: Router<Arc<Core>>,
    paths: Paths,
    schemas: Schemas,
}

impl Operations {
    pub fn new(core: Arc<Core>, access: Access) -> Self {
        let mut failure = Operation::public("");
        failure.know::<FailureSchema>();
        Self {
            core,
            access,
            router: Router::new(),
            public: Router::new(),
            paths: Paths::new(),
            schemas: failure.schemas,
        }
    }

    pub fn get<H: Handler<T, Arc<Core>>, T: 'static>(&mut self, path: &str, handler: H, operation: Operation) {
        self.on(MethodFilter::GET, HttpMethod::Get, path, handler, operation);
    }

    pub fn post<H: Handler<T, Arc<Core>>, T: 'static>(&mut self, path: &str, handler: H, operation: Operation) {
        self.on(MethodFilter::POST, HttpMethod::Post, path, handler, operation);
    }

    pub fn put<H: Handler<T, Arc<Core>>, T: 'static>(&mut self, path: &str, handler: H, operation: Operation) {
        self.on(MethodFilter::PUT, HttpMethod::Put, path, handler, operation);
    }

    pub fn patch<H: Handler<T, Arc<Core>>, T: 'static>(&mut self, path: &str, handler: H, operation: Operation) {
        self.on(MethodFilter::PATCH, HttpMethod::Patch, path, handler, operation);
    }

    pub fn delete<H: Handler<T, Arc<Core>>, T: 'static>(&mut self, path: &str, handler: H, operation: Operation) {
        self.on(MethodFilter::DELETE, HttpMethod::Delete, path, handler, operation);
    }

    fn on<H: Handler<T, Arc<Core>>, T: 'static>(
        &mut self,
        filter: MethodFilter,
        method: HttpMethod,
        path: &str,
        handler: H,
        operation: Operation,
    ) {
        let mut route = axum::routing::on(filter, handler);
        if !operation.takes_if_match && !matches!(method, HttpMethod::Get) {
            route = route.layer(axum::middleware::from_fn(super::refusals::without_if_match));
        }
        match operation.role {
            None => self.public = std::mem::take(&mut self.public).route(path, route),
            Some(role) => {
                let route = route.layer(axum::middleware::from_fn_with_state(role, guard));
                self.router = std::mem::take(&mut self.router).route(path, route);
            }
        }
        let is_creation = matches!(method, HttpMethod::Post) && operation.role.is_some();
        let mut described = OperationBuilder::new().summary(Some(operation.summary)).operation_id(Some(format!(
            "{}{}",
            format!("{:?}", filter).to_lowercase().chars().filter(char::is_ascii_alphabetic).collect::<String>(),
            path.replace(['/', '{', '}', '.', '-'], "_")
        )));
        for name in path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}')) {
            described = described.parameter(parameter(name, ParameterIn::Path, Type::String, "", true));
        }
        for (name, description, of) in operation.query {
            described = described.parameter(parameter(name, ParameterIn::Query, of, description, false));
        }
        if is_creation {
            let description = "The same key with the same request answers as the first time and does nothing again.";
            let header = parameter("Idempotency-Key", ParameterIn::Header, Type::String, description, false);
            described = described.parameter(header);
        }
        if operation.takes_if_match {
            let description =
                "The ETag of the version that the change is meant for, or several; 412 when it is another.";
            described =
                described.parameter(parameter("If-Match", ParameterIn::Header, Type::String, description, false));
        }
        if let Some(schema) = operation.takes {
            let content = ContentBuilder::new().schema(Some(schema)).build();
            let body = RequestBodyBuilder::new().content("application/json", content).required(Some(Required::True));
            described = described.request_body(Some(body.build()));
        }
        let mut done = ResponseBuilder::new().description("Done");
        if let Some((content, schema)) = operation.answers {
            done = done.content(content, ContentBuilder::new().schema(Some(schema)).build());
        }
        let done = done.build();
        for status in [Some(operation.status), operation.or_status].into_iter().flatten() {
            described = described.response(status.to_string(), done.clone());
        }
        let refusals = [
            ("400", "The request makes no sense"),
            ("401", "No valid token"),
            ("403", "The token's role does not allow it"),
            ("404", "There is no such thing"),
            ("409", "Not in this state"),
            ("412", "It was changed meanwhile"),
            ("413", "The request is too large"),
            ("422", "The idempotency key was used for another request"),
            ("429", "Too many attempts"),
            ("500", "It failed"),
            ("503", "Not now; try again"),
            ("504", "An agent or process server did not answer in time"),
        ];
        let failure: RefOr<Schema> = Ref::from_schema_name(FailureSchema::name()).into();
        for (status, description) in refusals {
            let content = ContentBuilder::new().schema(Some(failure.clone())).build();
            let response = ResponseBuilder::new().description(description).content("application/json", content);
            described = described.response(status, response.build());
        }
        if operation.role.is_some() {
            described = described.security(SecurityRequirement::new("token", Vec::<String>::new()));
        }
        self.schemas.extend(operation.schemas);
        let item = PathItem::new(method, described.build());
        match self.paths.paths.get_mut(path) {
            Some(known) => known.merge_operations(item),
            None => {
                self.paths.paths.insert(path.to_owned(), item);
            }
        }
    }

    /// The document, with `/api/v1` as its server.
    pub fn document(&self) -> OpenApi {
        let mut components = ComponentsBuilder::new();
        for (name, schema) in &self.schemas {
            components = components.schema(name.clone(), schema.clone());
        }
        let token = SecurityScheme::Http(HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build());
        let mut document = OpenApiBuilder::new()
            .info(InfoBuilder::new().title("Tidemark").version(env!("CARGO_PKG_VERSION")).build())
            .paths(self.paths.clone())
            .components(Some(components.security_scheme("token", token).build()))
            .build();
        document.servers = Some(vec![utoipa::openapi::Server::new("/api/v1")]);
        document
    }

    /// What was declared, behind the token where it is needed, and what answers everything else.
    pub fn into_router(self, otherwise: impl FnOnce(Router<Arc<Core>>) -> Router<Arc<Core>>) -> Router {
        let guarded = otherwise(self.router)
            .layer(axum::Extension(self.access.clone()))
            .layer(axum::middleware::from_fn_with_state(self.core.clone(), super::repeat::once))
            .layer(axum::middleware::from_fn_with_state(
                (self.core.clone(), self.access),
                super::access::require_token,
            ));
        guarded.merge(self.public).with_state(self.core)
    }
}

fn parameter(name: &str, place: ParameterIn, of: Type, description: &str, required: bool) -> ParameterBuilder {
    let schema: Schema = ObjectBuilder::new().schema_type(of).build().into();
    ParameterBuilder::new()
        .name(name)
        .parameter_in(place)
        .required(if required { Required::True } else { Required::False })
        .description((!description.is_empty()).then_some(description))
        .schema(Some(schema))
}
