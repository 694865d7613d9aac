//! One that is there already. Its connection is a Unix socket, or TCP on a network that is trusted: no TLS is spoken to it.

use std::error::Error;
use std::time::Duration;
use tidemark_base::error::with_causes;

use bytes::BytesMut;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::{IsNull, ToSql, Type, to_sql_checked};
use tokio_postgres::{Client, Config, NoTls};

use super::{Backend, DatabaseError, Row, Statement, Value};

/// `tidemark` in ASCII: held as long as a configuration server uses the database.
const LOCK: i64 = 0x7469_6465_6d61_726b;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long another session may take to end.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

pub struct Postgres {
    runtime: tokio::runtime::Runtime,
    config: Config,
    client: Option<Client>,
    name: String,
}

impl Postgres {
    /// Runs on a thread of its own: it waits for its answers.
    pub fn open(text: &str) -> Result<Self, DatabaseError> {
        let wrong = |reason: String| DatabaseError::Refused { name: "of the setting `database`".to_owned(), reason };
        let mut config: Config = text.parse().map_err(|error: tokio_postgres::Error| wrong(error.to_string()))?;
        config.connect_timeout(CONNECT_TIMEOUT).application_name("tidemark");
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| wrong(error.to_string()))?;
        // Without the password that it may hold.
        let name = format!("{} of PostgreSQL", config.get_dbname().or(config.get_user()).unwrap_or("tidemark"));
        let mut postgres = Self { runtime, config, client: None, name };
        postgres.connect()?;
        Ok(postgres)
    }

    fn connect(&mut self) -> Result<(), DatabaseError> {
        let name = self.name.clone();
        let config = self.config.clone();
        let client = self.runtime.block_on(async {
            let (client, connection) = config.connect(NoTls).await.map_err(|error| named(&name, &error))?;
            // Ends with its client.
            tokio::spawn(connection);
            // The session of a server that just ended, or was killed, goes when PostgreSQL notices.
            let patience = format!("SET lock_timeout = '{}s'", LOCK_PATIENCE.as_secs());
            client.batch_execute(&patience).await.map_err(|error| named(&name, &error))?;
            let locked = match client.query_one("SELECT pg_advisory_lock($1)", &[&LOCK]).await {
                Ok(_) => true,
                Err(error) if error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) => false,
                Err(error) => return Err(named(&name, &error)),
            };
            client
                .batch_execute("SET synchronous_commit = on; SET statement_timeout = '60s'; SET lock_timeout = 0")
                .await
                .map_err(|error| named(&name, &error))?;
            if locked { Ok(client) } else { Err(DatabaseError::Locked { name: name.clone() }) }
        })?;
        self.client = Some(client);
        Ok(())
    }

    fn usable(&mut self) -> Result<(), DatabaseError> {
        if self.client.as_ref().is_none_or(Client::is_closed) {
            self.client = None;
            self.connect()?;
        }
        Ok(())
    }
}

impl Backend for Postgres {
    fn write(&mut self, statements: &[Statement]) -> Result<(), DatabaseError> {
        self.usable()?;
        let (name, client) = (&self.name, self.client.as_mut());
        let client = client.ok_or_else(|| gone(name))?;
        self.runtime.block_on(async {
            let write = async {
                let transaction = client.transaction().await?;
                for statement in statements {
                    let values: Vec<&(dyn ToSql + Sync)> =
                        statement.values.iter().map(|value| value as &(dyn ToSql + Sync)).collect();
                    transaction.execute(statement.sql.as_str(), &values).await?;
                }
                transaction.commit().await
            };
            write.await.map_err(|error| named(name, &error))
        })
    }

    fn read(&mut self, statement: &Statement) -> Result<Vec<Row>, DatabaseError> {
        self.usable()?;
        let client = self.client.as_ref().ok_or_else(|| gone(&self.name))?;
        let values: Vec<&(dyn ToSql + Sync)> =
            statement.values.iter().map(|value| value as &(dyn ToSql + Sync)).collect();
        let rows = self
            .runtime
            .block_on(client.query(statement.sql.as_str(), &values))
            .map_err(|error| named(&self.name, &error))?;
        let value = |row: &tokio_postgres::Row, column: usize| match *row.columns()[column].type_() {
            Type::INT8 => row.try_get::<_, Option<i64>>(column).map(|value| value.map_or(Value::Null, Value::Int)),
            _ => row.try_get::<_, Option<String>>(column).map(Value::from),
        };
        rows.iter()
            .map(|row| (0..row.len()).map(|column| value(row, column)).collect::<Result<Row, _>>())
            .collect::<Result<_, _>>()
            .map_err(|error| named(&self.name, &error))
    }

    fn name(&self) -> String {
        self.name.clone()
    }
}

impl ToSql for Value {
    fn to_sql(&self, of: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn Error + Sync + Send>> {
        match self {
            Value::Null => Ok(IsNull::Yes),
            Value::Int(value) => value.to_sql(of, out),
            Value::Text(text) => text.as_str().to_sql(of, out),
        }
    }

    fn accepts(of: &Type) -> bool {
        matches!(*of, Type::INT8 | Type::TEXT | Type::VARCHAR)
    }

    to_sql_checked!();
}

fn gone(name: &str) -> DatabaseError {
    DatabaseError::Unreachable { name: name.to_owned(), reason: "the connection ended".to_owned() }
}

fn named(name: &str, error: &tokio_postgres::Error) -> DatabaseError {
    let name = name.to_owned();
    // Its own text is "db error"; what was wrong is in the source.
    let reason = match error.as_db_error() {
        Some(db) => db.message().to_owned(),
        None => with_causes(error),
    };
    match error.code() {
        Some(code) if *code == SqlState::DISK_FULL || *code == SqlState::OUT_OF_MEMORY => {
            DatabaseError::Full { name, reason }
        }
        Some(code) if *code == SqlState::DATA_CORRUPTED || *code == SqlState::INDEX_CORRUPTED => {
            DatabaseError::Damaged { name, reason }
        }
        Some(code)
            if *code == SqlState::ADMIN_SHUTDOWN
                || *code == SqlState::CRASH_SHUTDOWN
                || *code == SqlState::CANNOT_CONNECT_NOW =>
        {
            DatabaseError::Unreachable { name, reason }
        }
        Some(_) => DatabaseError::Refused { name, reason },
        None => DatabaseError::Unreachable { name, reason },
    }
}
