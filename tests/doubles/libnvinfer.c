/* What of TensorRT's libraries its Python bindings look up when they are imported. It builds nothing:
   the bindings' classes are their own, and are there to be looked at without a GPU and without
   TensorRT. Every library of it is this file, under the name that the bindings ask for. */
#define STUB(name) \
    void *name(void) { return 0; }
STUB(createInferBuilder_INTERNAL)
STUB(createInferRefitter_INTERNAL)
STUB(createInferRuntime_INTERNAL)
STUB(createNvOnnxParser_INTERNAL)
STUB(createNvOnnxParserRefitter_INTERNAL)
STUB(getBuilderPluginRegistry)
STUB(getNvOnnxParserVersion)
STUB(getPluginRegistry)
STUB(initLibNvInferPlugins)
