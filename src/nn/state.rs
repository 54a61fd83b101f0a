//! A module's tensors by name, and their file format.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Device, Tensor, TensorData};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

/// One tensor on the host.
#[derive(Clone, Debug, PartialEq)]
pub struct Named {
    /// Its extents.
    pub shape: Vec<usize>,
    /// Its entries, row by row.
    pub values: Vec<f32>,
}

impl Named {
    /// As a tensor of `D` axes, where it has so many.
    pub fn tensor<const D: usize>(&self, device: &Device) -> Option<Tensor<D>> {
        (self.shape.len() == D).then(|| {
            let data = TensorData::new(self.values.clone(), self.shape.clone());
            Tensor::from_data(data, device)
        })
    }
}

/// Tensors by their path in the module, such as `encoder.blocks.0.expand.weight`; parameters and running statistics
/// alike, variants of enumerations left out of the path.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StateDict(pub BTreeMap<String, Named>);

/// Why tensors cannot be read, or not be put into a module.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Not a file of the format.
    #[error("not a readable safetensors file: {0}")]
    Format(#[from] safetensors::SafeTensorError),
    /// Only 32-bit floating-point numbers are stored here.
    #[error("tensor `{0}` is not of type F32")]
    Dtype(String),
    /// The module needs a tensor that is not there.
    #[error("tensor `{0}` is missing")]
    Missing(String),
    /// The tensor belongs to another module.
    #[error("tensor `{name}` has shape {found:?}, this network needs {expected:?}")]
    Shape {
        /// Path of the tensor.
        name: String,
        /// Shape in the file.
        found: Vec<usize>,
        /// Shape in the module.
        expected: Vec<usize>,
    },
    /// The module has no such tensor.
    #[error("tensor `{0}` belongs to no part of this network")]
    Unknown(String),
}

const METADATA_KEY: &str = "qbheat";

impl StateDict {
    /// All tensors of `module`.
    pub fn of(module: &impl Module) -> Self {
        let mut reader = Reader::default();
        module.visit(&mut reader);
        Self(reader.tensors)
    }

    /// How many numbers are learned: all but running statistics.
    pub fn parameters(&self) -> usize {
        self.0
            .iter()
            .filter(|(name, _)| !is_statistic(name))
            .map(|(_, tensor)| tensor.values.len())
            .sum()
    }

    /// The tensors whose name starts with `prefix`, under the rest of their name.
    pub fn under(&self, prefix: &str) -> Self {
        Self(
            self.0
                .iter()
                .filter_map(|(name, tensor)| {
                    Some((name.strip_prefix(prefix)?.to_owned(), tensor.clone()))
                })
                .collect(),
        )
    }

    /// `module` with every tensor replaced by the one of its name. Both sides must name the same tensors.
    pub fn load_into<M: Module>(&self, module: M) -> Result<M, StateError> {
        let mut writer = Writer {
            path: Path::default(),
            source: self,
            used: 0,
            error: None,
        };
        let module = module.map(&mut writer);
        if let Some(error) = writer.error {
            return Err(error);
        }
        if writer.used < self.0.len() {
            let known = Self::of(&module);
            let extra = self.0.keys().find(|name| !known.0.contains_key(*name));
            if let Some(name) = extra {
                return Err(StateError::Unknown(name.clone()));
            }
        }
        Ok(module)
    }

    /// A safetensors file; `metadata` is text (JSON, say) that comes along under the key `qbheat`.
    pub fn to_bytes(&self, metadata: &str) -> Result<Vec<u8>, StateError> {
        let bytes: Vec<(&String, &Named, Vec<u8>)> = self
            .0
            .iter()
            .map(|(name, tensor)| {
                let bytes = tensor.values.iter().flat_map(|v| v.to_le_bytes()).collect();
                (name, tensor, bytes)
            })
            .collect();
        let views = bytes
            .iter()
            .map(|(name, tensor, bytes)| {
                Ok((
                    *name,
                    TensorView::new(Dtype::F32, tensor.shape.clone(), bytes)?,
                ))
            })
            .collect::<Result<Vec<_>, StateError>>()?;
        // One key only: the format stores a hash map, whose order would change from run to run.
        let metadata = [(METADATA_KEY.to_owned(), metadata.to_owned())].into();
        Ok(safetensors::serialize(views, Some(metadata))?)
    }

    /// The tensors of a safetensors file and the metadata under the key `qbheat`.
    pub fn from_bytes(bytes: &[u8]) -> Result<(Self, Option<String>), StateError> {
        let (_, header) = SafeTensors::read_metadata(bytes)?;
        let metadata = header
            .metadata()
            .as_ref()
            .and_then(|map| map.get(METADATA_KEY).cloned());
        let mut tensors = BTreeMap::new();
        for (name, view) in SafeTensors::deserialize(bytes)?.iter() {
            if view.dtype() != Dtype::F32 {
                return Err(StateError::Dtype(name.to_owned()));
            }
            let values = view
                .data()
                .as_chunks::<4>()
                .0
                .iter()
                .map(|bytes| f32::from_le_bytes(*bytes))
                .collect();
            let shape = view.shape().to_vec();
            tensors.insert(name.to_owned(), Named { shape, values });
        }
        Ok((Self(tensors), metadata))
    }
}

/// Whether the tensor at this path is a running statistic.
pub(super) fn is_statistic(path: &str) -> bool {
    let name = path.rsplit('.').next().unwrap_or(path);
    name.starts_with("running_")
}

/// All tensors of a module by path, flat; nothing is copied.
pub(super) fn tensors(module: &impl Module) -> BTreeMap<String, Tensor<1>> {
    struct Reader {
        path: Path,
        found: BTreeMap<String, Tensor<1>>,
    }
    impl ModuleVisitor for Reader {
        fn enter_module(&mut self, name: &str, container: &str) {
            self.path.enter(name, container);
        }

        fn exit_module(&mut self, _name: &str, _container: &str) {
            self.path.exit();
        }

        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let flat = param.val().reshape([-1]);
            self.found.insert(self.path.name(), flat);
        }
    }
    let mut reader = Reader {
        path: Path::default(),
        found: BTreeMap::new(),
    };
    module.visit(&mut reader);
    reader.found
}

/// `module` with what `change` makes of each tensor, by path and flat; where that is nothing, the tensor stays.
pub(super) fn with_tensors<M: Module>(
    module: M,
    change: impl FnMut(&str, Tensor<1>) -> Option<Tensor<1>>,
) -> M {
    struct Changer<F> {
        path: Path,
        change: F,
    }
    impl<F: FnMut(&str, Tensor<1>) -> Option<Tensor<1>>> ModuleMapper for Changer<F> {
        fn enter_module(&mut self, name: &str, container: &str) {
            self.path.enter(name, container);
        }

        fn exit_module(&mut self, _name: &str, _container: &str) {
            self.path.exit();
        }

        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            let flat = param.val().reshape([-1]);
            match (self.change)(&self.path.name(), flat) {
                Some(new) => param.map(|old| new.reshape(old.dims())),
                None => param,
            }
        }
    }
    module.map(&mut Changer {
        path: Path::default(),
        change,
    })
}

/// The path of the tensor that a traversal is at.
#[derive(Default)]
pub(crate) struct Path(Vec<Option<String>>);

impl Path {
    pub(crate) fn enter(&mut self, name: &str, container: &str) {
        let named = !container.starts_with("Enum:");
        self.0.push(named.then(|| name.to_owned()));
    }

    pub(crate) fn exit(&mut self) {
        self.0.pop();
    }

    pub(crate) fn name(&self) -> String {
        let parts: Vec<&str> = self.0.iter().flatten().map(String::as_str).collect();
        parts.join(".")
    }
}

/// A tensor's entries, row by row.
pub(crate) fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor
        .into_data()
        .try_into_vec::<f32>()
        .expect("parameters are of type f32")
}

#[derive(Default)]
struct Reader {
    path: Path,
    tensors: BTreeMap<String, Named>,
}

impl ModuleVisitor for Reader {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let tensor = param.val();
        let shape = tensor.dims().to_vec();
        let named = Named {
            shape,
            values: values(tensor),
        };
        self.tensors.insert(self.path.name(), named);
    }
}

struct Writer<'a> {
    path: Path,
    source: &'a StateDict,
    used: usize,
    error: Option<StateError>,
}

impl Writer<'_> {
    fn find(&self, expected: &[usize]) -> Result<TensorData, StateError> {
        let name = self.path.name();
        match self.source.0.get(&name) {
            None => Err(StateError::Missing(name)),
            Some(tensor) if tensor.shape != expected => Err(StateError::Shape {
                name,
                found: tensor.shape.clone(),
                expected: expected.to_vec(),
            }),
            Some(tensor) => Ok(TensorData::new(tensor.values.clone(), expected.to_vec())),
        }
    }
}

impl ModuleMapper for Writer<'_> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.exit();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        match self.find(&param.dims()) {
            Ok(data) => {
                self.used += 1;
                param.map(|old| {
                    let new = Tensor::from_data(data, &old.device());
                    new.set_require_grad(old.is_require_grad())
                })
            }
            Err(error) => {
                self.error.get_or_insert(error);
                param
            }
        }
    }
}
